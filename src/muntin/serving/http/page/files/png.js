// Reads the PNG files of labels: grey, 8 or 16 bits, not interlaced. A canvas would do for 8 bits, but some browsers alter what is read
// from one to keep a page from recognising its reader.

const SIGNATURE = [0x89, 0x50, 0x4e, 0x47, 0x0d, 0x0a, 0x1a, 0x0a];

/** Returns {width, height, labels}: class numbers, row by row. */
export async function readLabels(blob) {
  const bytes = new Uint8Array(await blob.arrayBuffer());
  if (!SIGNATURE.every((byte, index) => bytes[index] === byte)) throw new Error("the server's labels are not a PNG file");
  const view = new DataView(bytes.buffer);
  const parts = [];
  let width = 0, height = 0, depth = 0;
  for (let at = 8; at < bytes.length;) {
    const length = view.getUint32(at);
    const kind = String.fromCharCode(...bytes.subarray(at + 4, at + 8));
    if (kind === "IHDR") {
      [width, height, depth] = [view.getUint32(at + 8), view.getUint32(at + 12), bytes[at + 16]];
      const [color, , , interlaced] = bytes.subarray(at + 17, at + 21);
      if (color !== 0 || interlaced || (depth !== 8 && depth !== 16)) throw new Error("the server's labels are not grey values of 8 or 16 bits");
    }
    if (kind === "IDAT") parts.push(bytes.subarray(at + 8, at + 8 + length));
    at += 12 + length;
  }
  const inflated = new Blob(parts).stream().pipeThrough(new DecompressionStream("deflate"));
  const raw = new Uint8Array(await new Response(inflated).arrayBuffer());
  const size = depth / 8;
  const pixels = unfilter(raw, width * size, height, size);
  if (size === 1) return { width, height, labels: pixels };
  const labels = new Uint16Array(width * height);
  for (let index = 0; index < labels.length; index += 1) labels[index] = (pixels[2 * index] << 8) | pixels[2 * index + 1];
  return { width, height, labels };
}

// Each row begins with the number of its filter, which adds neighbours: left, above, their mean, or the nearest to left + above - corner.
function unfilter(raw, stride, height, size) {
  const out = new Uint8Array(stride * height);
  for (let row = 0; row < height; row += 1) {
    const from = row * (stride + 1) + 1, to = row * stride, filter = raw[from - 1];
    if (filter === 0) {
      out.set(raw.subarray(from, from + stride), to);
      continue;
    }
    for (let index = 0; index < stride; index += 1) {
      const left = index >= size ? out[to + index - size] : 0;
      const above = row ? out[to + index - stride] : 0;
      const corner = row && index >= size ? out[to + index - stride - size] : 0;
      out[to + index] = raw[from + index] + (
        filter === 1 ? left : filter === 2 ? above : filter === 3 ? (left + above) >> 1 : nearest(left, above, corner)
      );
    }
  }
  return out;
}

function nearest(left, above, corner) {
  const estimate = left + above - corner;
  const [a, b, c] = [Math.abs(estimate - left), Math.abs(estimate - above), Math.abs(estimate - corner)];
  return a <= b && a <= c ? left : b <= c ? above : corner;
}
