// Pictures from a drop, the clipboard and the two pickers.

const PICTURE = /\.(png|jpe?g|webp|tiff?|bmp)$/i;

/**
 * Calls `add(files, leftOut)` with each lot of files. Of a folder only those with a picture's suffix are taken, in the order of their
 * paths; `leftOut`: the number of the others. Single files are all taken: the server says what is wrong with them.
 */
export function collectFiles({ target, filePicker, folderPicker, add }) {
  filePicker.addEventListener("change", () => {
    add([...filePicker.files], 0);
    filePicker.value = "";
  });
  folderPicker.addEventListener("change", () => {
    addFolder([...folderPicker.files]);
    folderPicker.value = "";
  });
  document.addEventListener("paste", (event) => {
    const files = [...(event.clipboardData?.files ?? [])];
    if (files.length) add(files, 0);
  });
  let depth = 0;
  const carriesFiles = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
  const mark = (event, change) => {
    if (!carriesFiles(event)) return;
    event.preventDefault();
    depth = Math.max(0, depth + change);
    target.classList.toggle("over", depth > 0);
  };
  document.addEventListener("dragenter", (event) => mark(event, 1));
  document.addEventListener("dragleave", (event) => mark(event, -1));
  document.addEventListener("dragover", (event) => mark(event, 0));
  document.addEventListener("drop", async (event) => {
    if (!carriesFiles(event)) return;
    event.preventDefault();
    depth = 0;
    target.classList.remove("over");
    const entries = [...event.dataTransfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
    const dropped = [...event.dataTransfer.files];
    if (!entries.some((entry) => entry.isDirectory)) return add(dropped, 0);
    addFolder((await Promise.all(entries.map(filesOf))).flat());
  });

  function addFolder(files) {
    const pictures = files.filter((file) => PICTURE.test(file.name));
    pictures.sort((a, b) => pathOf(a).localeCompare(pathOf(b), undefined, { numeric: true }));
    add(pictures, files.length - pictures.length);
  }
}

const droppedPaths = new WeakMap(); // file of a dropped folder -> its path

/** The path of a file in its folder, or its name. */
export const pathOf = (file) => file.webkitRelativePath || droppedPaths.get(file) || file.name;

async function filesOf(entry) {
  if (entry.isFile) {
    const file = await new Promise((resolve, reject) => entry.file(resolve, reject));
    droppedPaths.set(file, entry.fullPath.slice(1));
    return [file];
  }
  const reader = entry.createReader();
  const files = [];
  for (;;) {
    const entries = await new Promise((resolve, reject) => reader.readEntries(resolve, reject)); // a hundred at a time
    if (!entries.length) return files;
    files.push(...(await Promise.all(entries.map(filesOf))).flat());
  }
}
