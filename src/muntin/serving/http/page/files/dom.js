// Elements and numbers as text. All text becomes text nodes: names of classes and files are never read as HTML.

export const byId = (id) => document.getElementById(id);

/** Makes an element. `properties` are set on it; `children`: elements or text. */
export function element(tag, properties, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

export function percent(share) {
  if (share === 0) return "0 %";
  return share < 0.001 ? "< 0.1 %" : `${(100 * share).toFixed(1)} %`;
}

export function milliseconds(value) {
  if (value === undefined || Number.isNaN(value)) return "–";
  if (value >= 999.5) return `${(value / 1000).toFixed(2)} s`;
  return `${value >= 99.5 ? value.toFixed(0) : value.toFixed(1)} ms`;
}
