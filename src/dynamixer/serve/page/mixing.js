// Mixing weights as arrays. An axis is {lines, segments, tokens, data}: data[line][segment][output][input], flat.

let halves = null;

function halfTable() {
  const table = new Float32Array(65536);
  for (let bits = 0; bits < 65536; bits++) {
    const exponent = (bits >> 10) & 31;
    const fraction = bits & 1023;
    const size = exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -14 * (fraction / 1024);
    table[bits] = bits & 32768 ? -size : size;
  }
  return table;
}

function decodeAxis(axis) {
  if (!axis) return null;
  halves ??= halfTable();
  const bytes = Uint8Array.from(atob(axis.data), (letter) => letter.charCodeAt(0));
  const words = new Uint16Array(bytes.buffer);
  const [lines, segments, tokens] = axis.shape;
  return { lines, segments, tokens, data: Float32Array.from(words, (word) => halves[word]) };
}

export function decodeBlocks(answer) {
  return answer.blocks.map((block) => ({ ...block, row: decodeAxis(block.row), column: decodeAxis(block.column) }));
}

// The matrix of one line, [output][input] flat; segment 0 is the mean of all, n the n-th.
function matrixOf(axis, line, segment) {
  const { tokens, segments, data } = axis;
  const size = tokens * tokens;
  const at = (axis.lines === 1 ? 0 : line) * segments;
  if (segment > 0) return data.subarray((at + segment - 1) * size, (at + segment) * size);
  const mean = new Float32Array(size);
  for (let s = 0; s < segments; s++) {
    for (let i = 0, from = (at + s) * size; i < size; i++) mean[i] += data[from + i] / segments;
  }
  return mean;
}

const minus = (a, b) => a.map((value, i) => value - b[i]);

// How much of the weights lies elsewhere than in another line of weights: from 0, the same, to 1, nothing in common.
function moved(a, b) {
  let difference = 0;
  let size = 0;
  for (let i = 0; i < a.length; i++) {
    difference += Math.abs(a[i] - b[i]);
    size += Math.abs(a[i]) + Math.abs(b[i]);
  }
  return size ? difference / size : 0;
}

// The token of a block under a place of the picture, both sides of which are 1.
export function tokenAt(block, place) {
  const [rows, columns] = block.grid;
  const index = (at, cell, most) => Math.max(0, Math.min(most - 1, Math.floor(at / cell + 1e-9)));
  return { i: index(place.v, block.cell[0], rows), j: index(place.u, block.cell[1], columns) };
}

export function placeOf(block, { i, j }) {
  const middle = (n, cell) => Math.min(1, ((n + 0.5) * cell + Math.min(1, n * cell)) / 2 + cell / 4 - 1e-9);
  return { u: middle(j, block.cell[1]), v: middle(i, block.cell[0]) };
}

function lookAlong(name, block, average, line, output, view) {
  const source = view.show === "average" ? average : block;
  const axis = source?.[name];
  if (!axis) return null;
  const segment = Math.min(view.segment, axis.segments);
  let matrix = matrixOf(axis, line, segment);
  const usual = average?.[name] ? matrixOf(average[name], line, segment) : null;
  const rowOf = (whole) => whole.slice(output * axis.tokens, (output + 1) * axis.tokens);
  const change = usual && view.show !== "average" ? moved(rowOf(matrix), rowOf(usual)) : null;
  if (view.show === "difference") matrix = minus(matrix, usual);
  const weights = rowOf(matrix);
  const best = weights.reduce((top, value, i) => (Math.abs(value) > Math.abs(weights[top]) ? i : top), 0);
  return { weights, matrix, tokens: axis.tokens, output, best, change, usual: view.show === "picture" && usual ? rowOf(usual) : null };
}

// What one token of one block reads: {token, row, column}, each of the two null where the model has no such branch.
export function look(block, average, view) {
  const token = tokenAt(block, view.place);
  return {
    token,
    row: lookAlong("row", block, average, token.i, token.j, view),
    column: lookAlong("column", block, average, token.j, token.i, view),
  };
}
