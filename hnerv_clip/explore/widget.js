// Draws the explorer of `widget.py`; needs nothing from the network.

const VIEWS = [["original", "Original"], ["decoded", "Decoded"], ["error", "Error"], ["wipe", "Wipe"]];
const HEATS = [["off", "Off"], ["network", "Network"], ["teacher", "Teacher"]];
const MOST_ZOOM = 12;
const STILL = 5; // pixels that a pointer may move within a click

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name in node) node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

/** With one decimal, and no sign where that is zero. */
const rounded = (value) => value.toFixed(1).replace("-0.0", "0.0");

/** Buttons of which one is pressed, bound to a trait. */
function choice(model, on, trait, words, options, disabled) {
  const buttons = options.map(([value, label]) => {
    const button = make("button", { type: "button", textContent: label, disabled: disabled(value) });
    button.addEventListener("click", () => { model.set(trait, value); model.save_changes(); });
    return button;
  });
  const update = () => options.forEach(([value], i) =>
    buttons[i].setAttribute("aria-pressed", String(model.get(trait) === value)));
  on(`change:${trait}`, update);
  update();
  return make("div", { className: "group", role: "group", ariaLabel: words },
    make("span", { textContent: words }), ...buttons);
}

/** Draws what is known of the video, and anew when more is. */
function render({ model, el }) {
  let clean = () => {};
  const update = () => {
    const typed = el.querySelector("input[type=search]")?.value;
    clean();
    el.replaceChildren();
    clean = (model.get("facts").frames ? draw : wait)({ model, el });
    if (typed) el.querySelector("input[type=search]").value = typed;
  };
  update();
  model.on("change:facts", update);
  return () => { model.off("change:facts", update); clean(); };
}

/** Nothing is known of the video yet: says what is being done, or what went wrong. */
function wait({ model, el }) {
  const progress = make("p", { className: "answer", role: "status" });
  const problem = make("p", { className: "problem", role: "alert" });
  const update = () => {
    progress.textContent = model.get("progress");
    problem.textContent = model.get("problem");
  };
  const told = ["change:progress", "change:problem"];
  told.forEach((name) => model.on(name, update));
  update();
  el.append(make("div", { className: "hnerv-explore" }, progress, problem));
  return () => told.forEach((name) => model.off(name, update));
}

function draw({ model, el }) {
  const facts = model.get("facts");
  const root = make("div", { className: "hnerv-explore" });
  root.dataset.lmSuppressShortcuts = "true";  // else keys go to JupyterLab's notebook
  const clean = [];
  const on = (name, act) => { model.on(name, act); clean.push(() => model.off(name, act)); };

  // What is asked
  const text = make("input", {
    type: "search", ariaLabel: "Text to search for", placeholder: "What to look for, such as hare",
    value: model.get("text"), disabled: !facts.has_head });
  const form = make("form", {}, text,
    make("button", { type: "submit", textContent: "Search", disabled: !facts.has_head }));
  const searchText = (event) => {
    event.preventDefault();
    if (model.get("text") === text.value) { model.set("text", ""); model.save_changes(); }
    model.set("text", text.value);
    model.save_changes();
  };
  form.addEventListener("submit", searchText);
  text.addEventListener("keydown", (event) => {  // in JupyterLab, Enter submits no form
    if (event.key === "Enter" && !event.isComposing) searchText(event);
  });
  on("change:text", () => { if (model.get("text")) text.value = model.get("text"); });
  const bar = make("div", { className: "bar" }, form,
    choice(model, on, "view", "Picture", VIEWS, (view) => view !== "decoded" && !facts.has_original),
    choice(model, on, "heat_of", "Heat map", HEATS, (whose) =>
      !facts.has_head || (whose === "teacher" && !facts.has_teacher)));
  if (facts.sides.length) {
    const sides = make("select", { ariaLabel: "Side of a clicked square, in frame heights" },
      ...facts.sides.map((side) => make("option", { value: side, textContent: side,
        selected: side === model.get("side") })));
    sides.addEventListener("change", () => { model.set("side", Number(sides.value)); model.save_changes(); });
    bar.append(make("div", { className: "group" }, make("span", { textContent: "Square" }), sides));
  }

  // The picture
  const image = (name, words) => make("img", { className: name, alt: words, draggable: false });
  const base = image("picture", "");
  const over = image("picture", "");
  const heat = image("heat", "");
  const boxes = make("div");
  const wiper = make("div", { className: "wiper" });
  const world = make("div", { className: "world" }, base, over, heat, boxes, wiper);
  const left = make("span", { className: "tag left" });
  const right = make("span", { className: "tag right" });
  const stage = make("div", { className: "stage", tabIndex: 0, role: "img" }, world, left, right);
  stage.style.aspectRatio = `${facts.width} / ${facts.height}`;
  const urls = new Map();
  clean.push(() => urls.forEach((url) => URL.revokeObjectURL(url)));

  function put(node, trait, type) {
    const bytes = model.get(trait);
    const old = urls.get(node);
    if (!bytes || !bytes.byteLength) { node.removeAttribute("src"); urls.delete(node); }
    else {
      const url = URL.createObjectURL(new Blob([bytes], { type }));
      urls.set(node, url);
      node.src = url;
    }
    if (old) setTimeout(() => URL.revokeObjectURL(old), 1000);
  }

  let wipe = 0.5;
  function drawPictures() {
    const view = model.get("view");
    put(base, view === "wipe" ? "original" : view, "image/jpeg");
    if (view === "wipe") put(over, "decoded", "image/jpeg");
    else { over.removeAttribute("src"); urls.delete(over); }
    drawWipe();
    left.textContent = { original: "original", decoded: "decoded", wipe: "original",
      error: `error × ${facts.gain}` }[view];
    right.textContent = model.get("decoded")?.byteLength ? "decoded" : "decoding …";
    right.hidden = view !== "wipe";
    const frame = model.get("shown");
    stage.ariaLabel = `Frame ${frame} of ${facts.name}, ${view}. Arrow keys step through frames.`;
  }
  function drawHeat() {
    put(heat, "heat", "image/png");
    stage.classList.toggle("heated", Boolean(heat.getAttribute("src")));
  }
  function drawWipe() {
    const wiping = model.get("view") === "wipe";
    over.style.clipPath = `inset(0 0 0 ${wipe * 100}%)`;
    wiper.style.left = `${wipe * 100}%`;
    wiper.hidden = !wiping;
    wiper.style.display = wiping ? "" : "none";
  }
  function box(hit, kind, label) {
    const node = make("div", { className: `box ${kind}`, title: label });
    node.style.left = `${(100 * hit.x0) / facts.width}%`;
    node.style.top = `${(100 * hit.y0) / facts.height}%`;
    node.style.width = `${(100 * (hit.x1 - hit.x0)) / facts.width}%`;
    node.style.height = `${(100 * (hit.y1 - hit.y0)) / facts.height}%`;
    return node;
  }
  function drawBoxes() {
    const frame = model.get("shown");
    const asked = model.get("asked");
    boxes.replaceChildren(...model.get("hits").filter((hit) => hit.frame === frame)
      .map((hit) => box(hit, "hit", `cosine ${hit.score.toFixed(2)}`)));
    if (asked.frame === frame) boxes.append(box(asked, "asked", "asked about"));
  }

  // Zoom, pan, wipe, click
  let zoom = 1, panX = 0, panY = 0, down = null;
  function place() {
    const { width, height } = stage.getBoundingClientRect();
    panX = Math.min(0, Math.max(width * (1 - zoom), panX));
    panY = Math.min(0, Math.max(height * (1 - zoom), panY));
    world.style.transform = `translate(${panX}px, ${panY}px) scale(${zoom})`;
    stage.classList.toggle("zoomed", zoom > 1);
    stage.classList.toggle("near", zoom >= 3);
    level.textContent = `${Math.round(zoom * 100)}%`;
    world.style.setProperty("--zoom", zoom);
  }
  function zoomTo(value, x, y) {
    const next = Math.min(MOST_ZOOM, Math.max(1, value));
    panX = x - ((x - panX) * next) / zoom;
    panY = y - ((y - panY) * next) / zoom;
    zoom = next;
    place();
  }
  const middle = () => { const r = stage.getBoundingClientRect(); return [r.width / 2, r.height / 2]; };
  const point = (event) => {
    const r = stage.getBoundingClientRect();
    return [event.clientX - r.left, event.clientY - r.top, r];
  };
  const level = make("span", { textContent: "100%" });
  const step = (words, factor) => {
    const button = make("button", { type: "button", textContent: factor ? (factor > 1 ? "+" : "−") : "Fit", ariaLabel: words });
    button.addEventListener("click", () => zoomTo(factor ? zoom * factor : 1, ...middle()));
    return button;
  };
  bar.append(make("div", { className: "group", role: "group", ariaLabel: "Zoom" },
    make("span", { textContent: "Zoom" }), step("zoom out", 1 / 1.5), level, step("zoom in", 1.5), step("whole picture", 0)));
  stage.addEventListener("wheel", (event) => {
    if (!event.ctrlKey && !event.metaKey && zoom === 1 && event.deltaY > 0) return; // the page scrolls
    event.preventDefault();
    const [x, y] = point(event);
    zoomTo(zoom * Math.exp(-event.deltaY / 400), x, y);
  }, { passive: false });
  stage.addEventListener("pointerdown", (event) => {
    if (event.button) return;
    down = { x: event.clientX, y: event.clientY, panX, panY, moved: false };
    stage.setPointerCapture(event.pointerId);
  });
  stage.addEventListener("pointermove", (event) => {
    const [x, , r] = point(event);
    if (down) {
      const dx = event.clientX - down.x, dy = event.clientY - down.y;
      down.moved ||= Math.hypot(dx, dy) > STILL;
      if (down.moved && zoom > 1) { panX = down.panX + dx; panY = down.panY + dy; place(); return; }
    }
    if (model.get("view") === "wipe") {
      wipe = Math.min(1, Math.max(0, (x - panX) / zoom / r.width));
      drawWipe();
    }
  });
  stage.addEventListener("pointerup", (event) => {
    const moved = down && down.moved;
    down = null;
    if (moved || event.button || !facts.has_head) return;
    const [x, y, r] = point(event);
    ask((x - panX) / zoom / r.width, (y - panY) / zoom / r.height);
  });
  stage.addEventListener("pointercancel", () => { down = null; });
  function ask(x, y) {
    model.set("region", { frame: model.get("shown"), x: x * facts.width, y: y * facts.height });
    model.save_changes();
  }

  // Time
  const slider = make("input", { type: "range", min: 0, max: facts.frames - 1, step: 1,
    value: model.get("frame"), ariaLabel: "Frame" });
  const marks = make("div");
  const where = make("span", { className: "where" });
  const play = make("button", { type: "button", textContent: "▶", ariaLabel: "Play" });
  let wanted = model.get("frame"), playing = false, timer = null;
  function go(frame) { // asks for one frame at a time: the newest, once the last has come
    wanted = Math.min(facts.frames - 1, Math.max(0, frame));
    slider.value = wanted;
    drawWhere();
    request();
  }
  let waiting = false;
  function request() {
    if (waiting || wanted === model.get("frame")) return;
    waiting = true;
    model.set("frame", wanted);
    model.save_changes();
  }
  function drawWhere() {
    const quality = model.get("quality");
    where.textContent = `frame ${wanted} of ${facts.frames} · ${facts.times[wanted].toFixed(2)} s`
      + (quality ? ` · ${quality}` : "");
  }
  slider.addEventListener("input", () => { stop(); go(Number(slider.value)); });
  stage.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (move) { event.preventDefault(); stop(); go(wanted + move); }
    if (event.key === "Enter" && facts.has_head) ask(0.5, 0.5);
  });
  function stop() { playing = false; clearTimeout(timer); play.textContent = "▶"; play.ariaLabel = "Play"; }
  play.addEventListener("click", () => {
    if (playing) { stop(); return; }
    playing = true; play.textContent = "❚❚"; play.ariaLabel = "Pause";
    next();
  });
  function next() { if (playing) go((wanted + 1) % facts.frames); }
  const rate = facts.frames > 1 ? 1000 * (facts.times[facts.frames - 1] / (facts.frames - 1)) : 40;
  on("change:shown", () => {
    waiting = false;
    if (playing) timer = setTimeout(next, rate);
    else if (wanted !== model.get("frame")) request();
    drawBoxes();
    drawWhere();
  });
  on("change:frame", () => {
    if (!waiting) { wanted = model.get("frame"); slider.value = wanted; drawWhere(); }
  });
  on("change:problem", () => { waiting = false; });
  for (const trait of ["original", "decoded", "error", "view"]) on(`change:${trait}`, drawPictures);
  on("change:heat", drawHeat);
  on("change:quality", drawWhere);

  // What was found
  const answer = make("p", { className: "answer", role: "status" });
  const problem = make("p", { className: "problem", role: "alert" });
  const hits = make("div", { className: "hits" });
  function drawHits() {
    hits.replaceChildren(...model.get("hits").map((hit, i) => {
      const button = make("button", { type: "button", ariaLabel: `Hit ${i + 1}: frame ${hit.frame}` },
        hit.picture ? make("img", { src: hit.picture, alt: "" }) : make("div", { className: "blank" }),
        make("span", { textContent: `frame ${hit.frame} · ${hit.time_s.toFixed(2)} s` }),
        make("span", { textContent: hit.match === undefined ? `cosine ${hit.score.toFixed(2)}`
          : `match ${rounded(hit.match)}` }));
      button.addEventListener("click", () => { stop(); go(hit.frame); });
      return button;
    }));
    marks.replaceChildren(...model.get("hits").map((hit) => {
      const mark = make("span", { className: "mark" });
      mark.style.left = `calc(8px + (100% - 16px) * ${hit.frame / Math.max(1, facts.frames - 1)})`;
      return mark;
    }));
    drawBoxes();
  }
  const drawWords = () => {
    answer.textContent = model.get("progress") || model.get("answer") || (facts.has_head
      ? "Type a text, or click on the picture for what is like that place." : "");
    problem.textContent = model.get("problem");
  };
  on("change:hits", drawHits);
  on("change:asked", drawBoxes);
  on("change:answer", drawWords);
  on("change:progress", drawWords);
  on("change:problem", drawWords);

  root.append(bar, stage, make("div", { className: "time" }, play, make("div", {}, slider, marks), where),
    problem, answer, hits, make("p", { className: "note", textContent:
      [facts.teacher && `Teacher: ${facts.teacher}.`, "Match: standard deviations above other names.",
        "Wheel or pinch zooms, dragging pans.", facts.credit && `${facts.credit}.`].filter(Boolean).join(" ") }));
  el.append(root);
  drawPictures(); drawHeat(); drawHits(); drawWords(); drawWhere();
  clean.push(stop);
  return () => clean.forEach((act) => act());
}

export default { render };
