// The page: what is chosen, and who has to be drawn again when it changes.

import { getJson, hasToken, patiently, useToken } from "./api.js";
import { readColours } from "./draw.js";
import { decodeBlocks } from "./mixing.js";
import { Panel } from "./panel.js";

const get = (id) => document.getElementById(id);
const PACE = 800; // milliseconds for each block while playing

const app = {
  model: null, samples: [], averaged: 0, noAverage: "", average: null, panels: [], playing: null, frame: null, speak: null,
  view: { block: 0, segment: 0, show: "picture", place: { u: 0.45, v: 0.45 }, held: false },

  changed() {
    this.frame ??= requestAnimationFrame(() => {
      this.frame = null;
      this.draw();
    });
  },

  move(place, held) {
    const inside = (value) => Math.max(0, Math.min(1, value));
    this.view.place = { u: inside(place.u), v: inside(place.v) };
    if (held !== undefined) this.view.held = held;
    this.changed();
  },

  show(block) {
    this.view.block = Math.max(0, Math.min(this.model.blocks.length - 1, block));
    this.changed();
  },

  step(by) {
    this.show(this.view.block + by);
  },

  // By hand: then it does not play on.
  choose(block) {
    play(false);
    this.show(block);
  },

  askForToken(sentence) {
    get("token").hidden = false;
    get("token-error").textContent = sentence;
    get("token-error").hidden = !sentence;
    get("description").hidden = true; // a link is followed without the token
    get("token-value").focus();
  },

  draw() {
    const { model, view } = this;
    if (model.mixing) {
      const { segments } = model.blocks[view.block];
      const grid = this.panels[0].blocks?.[view.block].grid;
      get("block").value = view.block;
      say(get("block-text"), `${view.block + 1} of ${model.blocks.length}`, grid ? ` · ${grid.join(" × ")} tokens` : "");
      get("segment").max = segments;
      get("segment").value = view.segment = Math.min(view.segment, segments);
      if (view.segment) say(get("segment-text"), `${view.segment} of ${segments}`, "");
      else say(get("segment-text"), "mean", ` of all ${segments}`);
      get("block").setAttribute("aria-valuetext", get("block-text").textContent);
      get("segment").setAttribute("aria-valuetext", get("segment-text").textContent);
      get("show-text").textContent = this.explanation() + this.noAverage;
    }
    for (const panel of this.panels) panel.draw();
    clearTimeout(this.speak);
    if (this.playing) return; // it would be told of every block
    this.speak = setTimeout(() => {
      get("spoken").textContent = this.panels.map((panel) => panel.spoken ?? "").join(" ");
    }, 400);
  },

  explanation() {
    const average = `the average over ${this.averaged} pictures`;
    const scale = this.model.mixing.softmax ? "The dashed line is an even share" : "Weights may be negative: violet, dashed";
    return {
      picture: `${scale}${this.average ? `; the small marks are ${average}` : ""}.`,
      average: `You see ${average}: the part that does not depend on the picture.`,
      difference: `This picture minus ${average}. Violet, dashed: this picture reads less there.`,
    }[this.view.show];
  },
};

// A text whose end is left out where there is little room.
function say(output, text, more) {
  if (output.textContent === text + more) return; // it would be read aloud again
  output.replaceChildren(text, Object.assign(document.createElement("span"), { className: "wide", textContent: more }));
}

function play(on) {
  clearInterval(app.playing);
  app.playing = null;
  get("play").setAttribute("aria-pressed", String(on));
  get("play").querySelector(".text").textContent = on ? "Stop" : "Play through the depth";
  if (!on) {
    app.changed(); // what was not read aloud while it played is now
    return;
  }
  const last = app.model.blocks.length - 1;
  app.show(app.view.block === last ? 0 : app.view.block);
  app.playing = setInterval(() => {
    if (app.view.block >= last) play(false);
    else app.step(1);
  }, PACE);
}

function compare(on) {
  get("compare").setAttribute("aria-pressed", String(on));
  get("compare").textContent = on ? "Back to one picture" : "Compare two pictures";
  get("panels").classList.toggle("two", on);
  if (on) {
    const second = new Panel(app, "Second picture");
    app.panels.push(second);
    get("panels").append(second.root);
    if (app.samples.length) second.useSample(Math.min(1, app.samples.length - 1));
  } else app.panels.pop().root.remove();
  app.changed();
}

function listen() {
  get("play").addEventListener("click", () => play(!app.playing));
  get("block").addEventListener("input", (event) => {
    app.choose(Number(event.target.value));
  });
  get("segment").addEventListener("input", (event) => {
    app.view.segment = Number(event.target.value);
    app.changed();
  });
  get("show").addEventListener("change", (event) => {
    app.view.show = event.target.value;
    app.changed();
  });
  get("compare").addEventListener("click", () => compare(app.panels.length === 1));
  new ResizeObserver(() => app.changed()).observe(get("panels"));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    readColours();
    app.changed();
  });
  document.addEventListener("paste", (event) => {
    const file = [...event.clipboardData.files][0];
    if (file) app.panels[0].use(file);
  });
  // A picture dropped beside the panels would replace the page.
  for (const kind of ["dragover", "drop"]) document.addEventListener(kind, (event) => event.preventDefault());
}

function describe(model) {
  const [height, width] = model.preprocessing.size;
  const facts = [
    model.model, `${model.classes.length} classes`, `${height} × ${width} px`, `${model.parameters.toLocaleString("en")} parameters`,
  ];
  get("about").textContent = facts.join(" · ");
  const { mixing } = model;
  const notes = [];
  if (!mixing && model.blocks.length) notes.push("Its matrices are too many for one page: it classifies all the same, and /v1/mixing gives some blocks at a time.");
  else if (!mixing) notes.push("This model is not a DynaMixer: it has no mixing matrices to show, and classifies all the same.");
  else {
    if (!mixing.row) notes.push("This model mixes along columns only.");
    if (!mixing.column) notes.push("This model mixes along rows only.");
    if (mixing.generator === "static") notes.push("Its matrices are trained and fixed: every picture and every line has the same.");
    if (mixing.generator === "dense") notes.push("Each token makes its own weights, from itself alone.");
    if (mixing.static) notes.push("A trained, fixed matrix is added to each generated one.");
    if (!mixing.softmax) notes.push("It has no softmax: weights may be negative and need not sum to one.");
    if (mixing.shared) notes.push("Rows and columns share one operator.");
    if (!mixing.reweight) notes.push("Its branches are summed, not weighed.");
  }
  get("notes").hidden = !notes.length;
  get("notes").replaceChildren(...notes.map((text) => Object.assign(document.createElement("li"), { textContent: text })));
}

async function start() {
  readColours();
  get("failure").hidden = true;
  try {
    for (let state; !(state = await getJson("healthz")).ready; ) {
      const reason = state.reason.charAt(0).toUpperCase() + state.reason.slice(1);
      get("about").textContent = reason;
      await new Promise((resolve) => setTimeout(resolve, 500));
    }
    app.model = await getJson("v1/model");
    if (!app.model.shows_all) app.model.mixing = null;
    const { samples, averaged } = await getJson("v1/samples");
    Object.assign(app, { samples, averaged });
  } catch (error) {
    get("about").textContent = "";
    if (error.status === 401) app.askForToken(error.message);
    else {
      get("failure").textContent = error.message;
      get("failure").hidden = false;
    }
    return;
  }
  describe(app.model);
  get("description").hidden = hasToken();
  for (const id of ["controls", "lead"]) get(id).hidden = !app.model.mixing;
  get("block").max = Math.max(0, app.model.blocks.length - 1);
  const first = new Panel(app, "Picture");
  app.panels = [first];
  get("panels").replaceChildren(first.root);
  listen();
  if (app.samples.length) first.useSample(0);
  app.draw();
  if (app.model.mixing) await addAverage();
}

async function addAverage() {
  try {
    app.average = decodeBlocks(await patiently(() => getJson("v1/average")));
    for (const radio of get("show").querySelectorAll("input")) radio.disabled = false;
  } catch (error) {
    if (error.status === 401) app.askForToken(error.message);
    else app.noAverage = ` There is no average: ${error.message}`;
    get("show").classList.add("without");
  }
  app.changed();
}

get("token").addEventListener("submit", (event) => {
  event.preventDefault();
  useToken(get("token-value").value);
  location.reload(); // with the token, in a page that has nothing left of the one before
});
start();
