// Canvases: the picture with its tokens lit, bars along its sides, matrices as heat maps.

let colours = {};

export function readColours() {
  const style = getComputedStyle(document.documentElement);
  for (const name of ["ink", "muted", "line", "card", "row", "column", "minus"]) {
    colours[name] = style.getPropertyValue(`--${name}`).trim();
  }
}

// A canvas of a size in CSS pixels, sharp on every screen.
function prepare(canvas, width, height) {
  const scale = window.devicePixelRatio || 1;
  const [w, h] = [Math.round(width * scale), Math.round(height * scale)];
  if (canvas.width !== w || canvas.height !== h) {
    canvas.width = w;
    canvas.height = h;
  }
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  const context = canvas.getContext("2d");
  context.setTransform(scale, 0, 0, scale, 0, 0);
  context.clearRect(0, 0, width, height);
  return context;
}

// A picture as it is; nothing where there is none.
export function drawPlain(canvas, width, height, image) {
  const context = prepare(canvas, width, height);
  if (image) context.drawImage(image, 0, 0, width, height);
}

// The photograph without most of its colour and light, which the tokens get back.
export function dimmed(image) {
  const canvas = document.createElement("canvas");
  canvas.width = image.naturalWidth;
  canvas.height = image.naturalHeight;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(image, 0, 0);
  const pixels = context.getImageData(0, 0, canvas.width, canvas.height);
  const { data } = pixels;
  for (let i = 0; i < data.length; i += 4) {
    const grey = 0.3 * data[i] + 0.59 * data[i + 1] + 0.11 * data[i + 2];
    for (let c = 0; c < 3; c++) data[i + c] = 20 + 0.46 * (0.8 * grey + 0.2 * data[i + c]);
  }
  context.putImageData(pixels, 0, 0);
  return canvas;
}

const scaleOf = (weights, floor) => weights.reduce((most, value) => Math.max(most, Math.abs(value)), floor);

// How bright a weight is shown, from 0 to 1: by its share of the greatest one, differences never blown up from nothing.
function brightness(along, show) {
  const floor = show === "difference" ? 0.5 / along.tokens : 1e-6;
  const most = scaleOf(along.weights, floor);
  return Array.from(along.weights, (value) => Math.abs(value) / most);
}

export function drawPicture(canvas, width, height, photo, block, seen, show, small = false) {
  const context = prepare(canvas, width, height);
  const [cellH, cellW] = [block.cell[0] * height, block.cell[1] * width];
  const { image, dim } = photo;
  context.drawImage(dim, 0, 0, width, height);
  if (!small && Math.min(cellH, cellW) >= 7) drawGrid(context, width, height, cellH, cellW);
  const rect = (i, j) => {
    const [x, y] = [j * cellW, i * cellH];
    return [x, y, Math.min(cellW, width - x), Math.min(cellH, height - y)];
  };
  const light = (i, j, share, value, colour) => {
    const [x, y, w, h] = rect(i, j);
    if (w <= 0.5 || h <= 0.5) return;
    context.globalAlpha = Math.min(1, share ** 0.8);
    const [fx, fy] = [image.naturalWidth / width, image.naturalHeight / height];
    context.drawImage(image, x * fx, y * fy, w * fx, h * fy, x, y, w, h);
    const edge = small ? 1 : Math.max(1.5, Math.min(3, cellW / 12));
    context.globalAlpha = 0.18 + 0.82 * share;
    context.strokeStyle = value < 0 ? colours.minus : colour;
    context.lineWidth = edge;
    context.setLineDash(value < 0 && !small ? [4, 3] : []);
    context.strokeRect(x + edge / 2 + 0.5, y + edge / 2 + 0.5, w - edge - 1, h - edge - 1);
    context.setLineDash([]);
  };
  const { token, row, column } = seen;
  const axes = [
    [row, (k) => [token.i, k], colours.row],
    [column, (k) => [k, token.j], colours.column],
  ];
  for (const [along, where, colour] of axes) {
    if (along) brightness(along, show).forEach((share, k) => light(...where(k), share, along.weights[k], colour));
  }
  context.globalAlpha = 1;
  const [x, y, w, h] = rect(token.i, token.j);
  for (const [colour, thick] of small ? [["#fff", 1.5]] : [["#000", 5], ["#fff", 2.5]]) {
    context.strokeStyle = colour;
    context.lineWidth = thick;
    context.strokeRect(x + 1, y + 1, Math.max(2, w - 2), Math.max(2, h - 2));
  }
}

function drawGrid(context, width, height, cellH, cellW) {
  context.strokeStyle = "rgba(255, 255, 255, 0.09)";
  context.lineWidth = 1;
  context.beginPath();
  for (let x = cellW; x < width - 1; x += cellW) {
    context.moveTo(Math.round(x) + 0.5, 0);
    context.lineTo(Math.round(x) + 0.5, height);
  }
  for (let y = cellH; y < height - 1; y += cellH) {
    context.moveTo(0, Math.round(y) + 0.5);
    context.lineTo(width, Math.round(y) + 0.5);
  }
  context.stroke();
}

// Bars along one side of the picture, each beside its token: below it for the row, right of it for the column.
// Returns the weight that the longest bar that fits would have.
export function drawBars(canvas, width, height, along, cell, name, softmax) {
  const context = prepare(canvas, width, height);
  if (!along) return 0;
  const lying = name === "column";
  const [length, depth] = lying ? [height, width] : [width, height];
  const place = (start, from, size, to) => (lying ? [from, start, to - from, size] : [start, from, size, to - from]);
  const signed = [...along.weights, ...(along.usual ?? [])].some((value) => value < 0);
  const even = 1 / along.tokens;
  const most = scaleOf([...along.weights, ...(along.usual ?? [])], softmax ? 1.25 * even : 1e-6);
  const zero = signed ? depth / 2 : 1;
  const reach = (depth - (signed ? depth / 2 : 1) - 2) / most;
  const step = cell * length;
  along.weights.forEach((value, k) => {
    const start = k * step;
    const size = Math.min(step, length - start) - Math.min(2, step / 4);
    if (size <= 0) return;
    context.globalAlpha = k === along.output ? 1 : 0.82;
    context.fillStyle = value < 0 ? colours.minus : colours[name];
    context.fillRect(...place(start + 0.5, zero, size, zero + value * reach));
    if (along.usual) {
      const end = zero + along.usual[k] * reach;
      context.globalAlpha = 1;
      context.fillStyle = colours.ink;
      context.fillRect(...place(start + 0.5, end - 1, size, end + 1));
    }
  });
  context.globalAlpha = 1;
  context.fillStyle = colours.muted;
  context.fillRect(...place(0, zero - 1, length, zero));
  if (softmax && !signed) {
    context.strokeStyle = colours.muted;
    context.setLineDash([3, 3]);
    context.beginPath();
    const at = zero + even * reach;
    context.moveTo(...(lying ? [at, 0] : [0, at]));
    context.lineTo(...(lying ? [at, length] : [length, at]));
    context.stroke();
    context.setLineDash([]);
  }
  return most;
}

function rgb(colour) {
  const value = Number.parseInt(colour.slice(1), 16);
  return [value >> 16, (value >> 8) & 255, value & 255];
}

// One line's matrix: a row for each token that is written, a column for each that is read; the chosen one framed.
export function drawMatrix(canvas, side, along, name) {
  const context = prepare(canvas, side, side);
  if (!along) return;
  const n = along.tokens;
  const most = scaleOf(along.matrix, 0.5 / n);
  const [paper, plus, minus] = [rgb(colours.card), rgb(colours[name]), rgb(colours.minus)];
  const cells = new ImageData(n, n);
  along.matrix.forEach((value, at) => {
    const ink = value < 0 ? minus : plus;
    const share = (Math.abs(value) / most) ** 0.75;
    for (let c = 0; c < 3; c++) cells.data[4 * at + c] = paper[c] + (ink[c] - paper[c]) * share;
    cells.data[4 * at + 3] = 255;
  });
  const plain = document.createElement("canvas");
  plain.width = plain.height = n;
  plain.getContext("2d").putImageData(cells, 0, 0);
  context.imageSmoothingEnabled = false;
  context.drawImage(plain, 0, 0, side, side);
  context.strokeStyle = colours.ink;
  context.lineWidth = 2;
  context.strokeRect(1, Math.min(side - 5, (along.output * side) / n) + 1, side - 2, Math.max(3, side / n - 2));
}
