// The picture with up to two layers above it, and the divider between them.

const LONGEST = 4096; // pixels a side that are drawn; larger pictures are thinned out

export class Stage {
  constructor(byId) {
    this.frame = byId("frame");
    this.picture = byId("picture");
    this.layers = [byId("one"), byId("two")];
    this.names = [byId("name-one"), byId("name-two")];
    this.pointed = () => {}; // called with the pointer's place, both from 0 to 1, and with null when it leaves
    this.divider = byId("divider");
    this.moveTo(50);
    this.listen();
  }

  /** Draws a picture, or nothing where the browser cannot decode it (TIFF). Returns {width, height}, or null. */
  drawPicture(bitmap, label) {
    this.picture.setAttribute("aria-label", label);
    if (bitmap === null) return;
    const shrink = Math.max(1, Math.max(bitmap.width, bitmap.height) / LONGEST);
    drawBitmap(this.picture, bitmap, Math.round(bitmap.width / shrink), Math.round(bitmap.height / shrink));
  }

  /** Sets the size of the frame: that of the answer, or of the picture. */
  resize(width, height) {
    this.frame.style.setProperty("--ratio", width / height);
    this.frame.classList.toggle("coarse", Math.max(width, height) < 256);
  }

  clearPicture() {
    this.picture.width = this.picture.height = 1;
  }

  /** Paints layer 0 or 1. `content`: {labels, width, height, colors} or {bitmap} or null for the bare picture. */
  paint(index, content) {
    const canvas = this.layers[index];
    if (content === null) canvas.width = canvas.height = 1;
    else if (content.bitmap) drawBitmap(canvas, content.bitmap, content.bitmap.width, content.bitmap.height);
    else paintLabels(canvas, content);
  }

  /** Shows one layer, or two beside the divider if `names` are given. */
  compare(names) {
    this.frame.classList.toggle("compared", names !== null);
    this.layers[1].hidden = this.divider.hidden = names === null;
    this.names.forEach((label, index) => {
      label.hidden = names === null;
      label.textContent = names?.[index] ?? "";
    });
    if (names) this.divider.setAttribute("aria-label", `Divider: ${names[0]} on the left, ${names[1]} on the right`);
  }

  set opacity(percent) {
    this.frame.style.setProperty("--opacity", percent / 100);
  }

  moveTo(percent) {
    this.at = Math.min(100, Math.max(0, percent));
    this.frame.style.setProperty("--at", `${this.at}%`);
    this.divider.setAttribute("aria-valuenow", Math.round(this.at));
    this.divider.setAttribute("aria-valuetext", `${Math.round(this.at)} % from the left`);
  }

  listen() {
    const steps = { ArrowLeft: -2, ArrowDown: -2, ArrowRight: 2, ArrowUp: 2, PageDown: -10, PageUp: 10, Home: -100, End: 100 };
    this.divider.addEventListener("keydown", (event) => {
      if (!(event.key in steps)) return;
      event.preventDefault();
      this.moveTo(this.at + steps[event.key]);
    });
    const follow = (event) => {
      const box = this.frame.getBoundingClientRect();
      this.moveTo((100 * (event.clientX - box.left)) / box.width);
    };
    this.frame.addEventListener("pointerdown", (event) => {
      if (this.divider.hidden || event.button !== 0) return;
      event.preventDefault();
      this.divider.focus({ focusVisible: false });
      this.frame.setPointerCapture(event.pointerId);
      follow(event);
    });
    this.frame.addEventListener("pointermove", (event) => {
      if (this.frame.hasPointerCapture(event.pointerId)) follow(event);
      const box = this.frame.getBoundingClientRect();
      const [x, y] = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
      if (x >= 0 && x < 1 && y >= 0 && y < 1) this.pointed(x, y);
    });
    this.frame.addEventListener("pointerleave", () => this.pointed(null, null));
  }
}

function drawBitmap(canvas, bitmap, width, height) {
  canvas.width = width;
  canvas.height = height;
  canvas.getContext("2d").drawImage(bitmap, 0, 0, width, height);
}

// `colors`: of each class [red, green, blue], or null to leave its pixels transparent, as those of no class are.
function paintLabels(canvas, { labels, width, height, colors }) {
  const step = Math.ceil(Math.max(width, height) / LONGEST);
  canvas.width = Math.ceil(width / step);
  canvas.height = Math.ceil(height / step);
  const image = new ImageData(canvas.width, canvas.height);
  const words = new Uint32Array(image.data.buffer);
  const bytes = new Uint8ClampedArray(4 * colors.length);
  colors.forEach((color, index) => color && bytes.set([...color, 255], 4 * index));
  const table = new Uint32Array(bytes.buffer);
  let at = 0;
  for (let row = 0; row < height; row += step) {
    for (let column = 0; column < width; column += step) words[at++] = table[labels[row * width + column]] ?? 0;
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
}
