// One picture with all that is shown of it.

import { getBlob, postPicture } from "./api.js";
import { dimmed, drawBars, drawMatrix, drawPicture, drawPlain } from "./draw.js";
import { decodeBlocks, look, placeOf, tokenAt } from "./mixing.js";

const BARS = 64;
const FILM = 60;
const element = (tag, properties, ...children) => {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
};

const load = (source) =>
  new Promise((resolve, reject) => {
    const image = new Image();
    image.onload = () => resolve(image);
    image.onerror = () => reject(new Error("The picture cannot be shown."));
    image.src = source;
  });

// Null for what the browser cannot show, though the server can read it.
async function loadBlob(blob) {
  const address = URL.createObjectURL(blob);
  try {
    return await load(address);
  } catch {
    return null;
  } finally {
    URL.revokeObjectURL(address);
  }
}

export class Panel {
  // `app` has model, samples, average, view, and the functions changed() and move(place, pin).
  constructor(app, title) {
    this.app = app;
    this.title = title;
    this.root = document.getElementById("panel").content.cloneNode(true).firstElementChild;
    this.find = (selector) => this.root.querySelector(selector);
    this.root.setAttribute("aria-label", title);
    this.find("h2").textContent = title;
    this.blocks = null;
    this.photo = null;
    this.asked = null;
    this.listen();
    this.showSamples();
    const mixes = Boolean(app.model.mixing);
    this.root.classList.toggle("no-mixing", !mixes);
    if (mixes) this.find(".picker").setAttribute("aria-label", title);
    else for (const name of ["role", "aria-roledescription", "tabindex"]) this.find(".picker").removeAttribute(name);
  }

  listen() {
    const input = this.find("input[type=file]");
    this.find(".choose").addEventListener("click", () => input.click());
    input.addEventListener("change", () => {
      if (input.files.length) this.use(input.files[0]);
      input.value = "";
    });
    this.root.addEventListener("dragover", (event) => {
      event.preventDefault();
      this.root.classList.add("dragged");
    });
    this.root.addEventListener("dragleave", (event) => {
      if (!this.root.contains(event.relatedTarget)) this.root.classList.remove("dragged");
    });
    this.root.addEventListener("drop", (event) => {
      event.preventDefault();
      this.root.classList.remove("dragged");
      if (event.dataTransfer.files.length) this.use(event.dataTransfer.files[0]);
      else this.fail("What was dropped is not a file: save the picture first, then drop it.");
    });
    const picker = this.find(".picker");
    const place = (event) => {
      const box = picker.getBoundingClientRect();
      return { u: (event.clientX - box.left) / box.width, v: (event.clientY - box.top) / box.height };
    };
    picker.addEventListener("pointermove", (event) => {
      if (event.pointerType !== "mouse" || !this.app.view.held) this.app.move(place(event));
    });
    picker.addEventListener("pointerdown", (event) => {
      if (event.button) return; // not the main one
      const held = event.pointerType === "mouse" && !this.app.view.held;
      this.app.move(place(event), held);
    });
    picker.addEventListener("keydown", (event) => this.key(event));
  }

  key(event) {
    const block = this.blocks?.[this.app.view.block];
    if (!block) return;
    const { i, j } = tokenAt(block, this.app.view.place);
    const [rows, columns] = block.grid;
    const to = {
      ArrowLeft: [i, j - 1], ArrowRight: [i, j + 1], ArrowUp: [i - 1, j], ArrowDown: [i + 1, j],
      Home: [i, 0], End: [i, columns - 1],
    }[event.key];
    if (to) {
      const inside = { i: Math.max(0, Math.min(rows - 1, to[0])), j: Math.max(0, Math.min(columns - 1, to[1])) };
      this.app.move(placeOf(block, inside), true);
    } else if (event.key === "PageUp" || event.key === "PageDown") {
      this.app.choose(this.app.view.block + (event.key === "PageUp" ? -1 : 1));
    } else return;
    event.preventDefault();
  }

  showSamples() {
    this.find(".samples").replaceChildren(
      ...this.app.samples.map((sample) => {
        const image = element("img", { src: sample.thumbnail, alt: "", width: 48, height: 48 });
        const button = element("button", { title: sample.name }, image);
        button.setAttribute("aria-label", `Sample: ${sample.name}`);
        button.addEventListener("click", () => this.useSample(sample.number));
        return element("li", {}, button);
      }),
    );
  }

  mark(number) {
    this.find(".samples")
      .querySelectorAll("button")
      .forEach((button, i) => button.setAttribute("aria-pressed", String(i === number)));
  }

  useSample(number) {
    this.take((signal) => getBlob(`v1/samples/${number}`, signal), number);
  }

  use(file) {
    const most = this.app.model.limits.max_bytes;
    if (file.size > most) {
      this.fail(`The file has ${file.size.toLocaleString("en")} bytes; at most ${most.toLocaleString("en")} are accepted.`);
    } else this.take(() => file);
  }

  // Show the picture that `bring` brings, unless another is asked for meanwhile.
  async take(bring, number = -1) {
    this.asked?.abort();
    const asked = new AbortController();
    this.asked = asked;
    this.root.setAttribute("aria-busy", "true");
    try {
      const blob = await bring(asked.signal);
      const mixes = Boolean(this.app.model.mixing);
      const answer = await postPicture(mixes ? "v1/mixing?view=true" : "v1/predict", blob, asked.signal);
      const image = mixes ? await load(answer.view) : await loadBlob(blob);
      if (this.asked !== asked) return;
      this.photo = image && { image, dim: mixes ? dimmed(image) : null };
      this.blocks = mixes ? decodeBlocks(answer) : null;
      this.fail(null);
      this.mark(number);
      this.showTop(answer.top);
      const [best] = answer.top;
      this.answer = best ? `${best.label}, ${(100 * best.probability).toFixed(0)} percent` : "";
      this.spoken = `${this.title}: ${this.answer}.`;
      this.app.changed();
    } catch (error) {
      if (this.asked === asked) this.fail(error.message, error.status);
    } finally {
      if (this.asked === asked) this.root.removeAttribute("aria-busy");
    }
  }

  fail(sentence, status) {
    if (status === 401) this.app.askForToken(sentence);
    const line = this.find(".error");
    line.hidden = !sentence || status === 401;
    line.textContent = sentence ?? "";
  }

  showTop(top) {
    this.find(".top").replaceChildren(
      ...top.map(({ label, probability }) => {
        const fill = element("i", {});
        fill.style.width = `${100 * probability}%`;
        const percent = `${(100 * probability).toFixed(1)} %`;
        return element(
          "li", {}, element("span", { className: "label", textContent: label }),
          element("span", { className: "percent", textContent: percent }), element("span", { className: "bar" }, fill),
        );
      }),
    );
  }

  draw() {
    const block = this.blocks?.[this.app.view.block];
    if (!this.photo) {
      drawPlain(this.find(".picture"), 0, 0, null);
      return;
    }
    const { image } = this.photo;
    const stage = this.find(".stage");
    const room = Math.max(120, stage.clientWidth - (block ? BARS + 6 : 0));
    const tallest = Math.max(400, Math.min(560, window.innerHeight - 480)); // with its bars on one screen, where it can be
    const width = Math.floor(Math.min(room, (tallest * image.naturalWidth) / image.naturalHeight));
    const height = Math.floor((width * image.naturalHeight) / image.naturalWidth);
    if (!block) {
      drawPlain(this.find(".picture"), width, height, image);
      return;
    }
    const { view, model } = this.app;
    const average = this.app.average?.[view.block];
    const seen = look(block, average, view);
    const softmax = model.mixing.softmax && view.show !== "difference";
    drawPicture(this.find(".picture"), width, height, this.photo, block, seen, view.show);
    const scales = [
      ["row", drawBars(this.find(".row-bars"), width, BARS, seen.row, block.cell[1], "row", softmax)],
      ["column", drawBars(this.find(".column-bars"), BARS, height, seen.column, block.cell[0], "column", softmax)],
    ];
    this.find(".corner").replaceChildren(
      "full bar",
      ...scales.filter(([, most]) => most).map(([name, most]) => element("b", { className: name, textContent: this.value(most).replace("+", "") })),
    );
    const half = Math.min(184, Math.floor((this.find(".matrices").clientWidth - 16) / 2));
    for (const name of ["row", "column"]) {
      drawMatrix(this.find(`figure.${name} canvas`), half, seen[name], name);
      this.find(`figure.${name}`).hidden = !seen[name];
      const line = (name === "row" ? seen.token.i : seen.token.j) + 1;
      this.find(`figure.${name} figcaption`).textContent =
        `${name} ${line}`;
    }
    this.find(".caption").replaceChildren(...this.sentences(seen, block));
    const spoken = this.find(".caption").textContent;
    this.find(".picker").setAttribute("aria-label", `${this.title}. Arrow keys move the token, Page Up and Page Down the block.`);
    this.spoken = `${this.title}: ${this.answer}. ${spoken}`;
    this.drawBranches(block);
    this.drawFilm();
  }

  value(weight) {
    const sign = this.app.view.show === "difference" && weight > 0 ? "+" : "";
    const unit = this.app.view.show === "difference" ? "points" : "%";
    const text = this.app.model.mixing.softmax ? `${(100 * weight).toFixed(0)}\u00a0${unit}` : weight.toFixed(2);
    return sign + text.replace("-", "\u2212");
  }

  sentences(seen, block) {
    const { view } = this.app;
    const text = [`Token in row ${seen.token.i + 1}, column ${seen.token.j + 1} of ${block.grid[0]} × ${block.grid[1]}. `];
    for (const [name, other] of [["row", "column"], ["column", "row"]]) {
      const along = seen[name];
      const word = element("b", { className: name, textContent: `Its ${name}` });
      if (!along) {
        text.push(word, " is not mixed by this model. ");
        continue;
      }
      const what = view.show === "difference" ? "differs most at" : "reads most from";
      text.push(word, ` ${what} ${other} ${along.best + 1} (${this.value(along.weights[along.best])})`);
      text.push(along.change === null ? ". " : `; ${(100 * along.change).toFixed(0)}\u00a0% of it lies elsewhere than on average. `);
    }
    return text;
  }

  drawBranches(block) {
    const section = this.find(".branches");
    const average = this.app.average?.[this.app.view.block];
    const shares = (this.app.view.show === "average" ? average : block)?.branches;
    section.hidden = !shares;
    if (!shares) return;
    for (const name of ["column", "row", "channel"]) {
      const part = section.querySelector(`i.${name}`);
      part.hidden = !(name in shares);
      part.style.width = `${100 * (shares[name] ?? 0)}%`;
    }
    const text = Object.entries(shares).map(([name, share]) => `${name} ${(100 * share).toFixed(0)} %`);
    section.querySelector("p").textContent = `${text.join(" · ")} (mean over channels${this.app.view.show === "average" ? ", on average" : ""})`;
  }

  drawFilm() {
    const film = this.find(".film");
    const { view } = this.app;
    if (film.children.length !== this.blocks.length) {
      film.replaceChildren(
        ...this.blocks.map((block, number) => {
          const button = element("button", {}, element("canvas", {}), element("span", { textContent: number + 1 }));
          button.setAttribute("aria-label", `Block ${number + 1}`);
          button.addEventListener("click", () => this.app.choose(number));
          return button;
        }),
      );
    }
    const { image } = this.photo;
    const ratio = image.naturalWidth / image.naturalHeight;
    const [width, height] = ratio > 1 ? [FILM, FILM / ratio] : [FILM * ratio, FILM];
    this.blocks.forEach((block, number) => {
      const button = film.children[number];
      button.setAttribute("aria-pressed", String(number === view.block));
      const seen = look(block, this.app.average?.[number], view);
      drawPicture(button.firstChild, width, height, this.photo, block, seen, view.show, true);
    });
    const chosen = film.children[view.block];
    film.scrollLeft = chosen.offsetLeft - film.offsetLeft - (film.clientWidth - chosen.offsetWidth) / 2;
  }
}

