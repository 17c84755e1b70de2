// The menus: what is chosen, how it comes from the address and goes there, and what it redraws.

const AXES = {
  size: "batch size",
  epochs: "epochs",
  steps: "optimizer steps",
  seconds: "seconds of a run",
  bytes: "MiB held for the backward pass",
  peak: "MiB at the peak of the run",
};
const hidden = new Set(); // labels of the lines that are switched off
const defaults = {};

function element(id) {
  return document.getElementById(id);
}

function chosen(id) {
  const control = element(id);
  return control.type === "checkbox" ? control.checked : control.value;
}

function offer(id, options, selected) {
  const menu = element(id);
  menu.replaceChildren(
    ...options.map(([value, text]) => {
      const option = document.createElement("option");
      option.value = value;
      option.textContent = text;
      return option;
    }),
  );
  if (selected !== undefined && options.some(([value]) => value === selected)) menu.value = selected;
  menu.disabled = options.length < 2;
}

// The numbers of the panels that are shown; a baseline only when it is asked for alone.
function shownPanels() {
  const study = chosen("study");
  const one = chosen("panel");
  return data.panels.flatMap((panel, i) => {
    if (one !== "all") return String(i) === one ? [i] : [];
    return !panel.beside && (study === "all" || String(panel.study) === study) ? [i] : [];
  });
}

function shownStudies() {
  const study = chosen("study");
  return data.studies.map((_, i) => i).filter((i) => study === "all" || String(i) === study);
}

function panelTitle(panel) {
  const study = data.studies.length > 1 ? `${data.studies[panel.study].name}: ` : "";
  return `${study}${panel.dataset}, ${panel.model}`;
}

// The cells of a panel whose lines are switched on, from small to large batch sizes.
function cellsOf(panel) {
  return data.cells
    .filter((cell) => cell.panel === panel && !hidden.has(data.lines[lineOf(cell)].label))
    .sort((a, b) => a.size - b.size);
}

// With a setting as the axis, the cells of a line differ in it.
function lineOf(cell) {
  return chosen("axis") === "setting" && cell.joined !== null ? cell.joined : cell.line;
}

function offerPanels(selected) {
  const study = chosen("study");
  const of = data.panels
    .map((panel, i) => [String(i), panel])
    .filter(([, panel]) => study === "all" || String(panel.study) === study);
  const single = of.map(([i, panel]) => [i, panelTitle(panel)]);
  offer("panel", single.length === 1 ? single : [["all", "all"], ...single], selected);
}

function offerAxes() {
  const panels = shownPanels();
  const cells = data.cells.filter((cell) => panels.includes(cell.panel));
  const setting = data.studies[data.panels[panels[0]]?.study]?.setting;
  const known = Object.entries(AXES).filter(
    ([key]) => key === "size" || cells.some((cell) => cell.x[key] !== null),
  );
  if (setting && cells.every((cell) => cell.x.setting !== undefined)) known.unshift(["setting", setting]);
  offer("axis", known, chosen("axis") || known[0][0]);
}

function offerLines() {
  const panels = shownPanels();
  const cells = data.cells.filter((cell) => panels.includes(cell.panel));
  const numbers = [...new Set(cells.map(lineOf))].sort((a, b) => a - b);
  const boxes = numbers.map((number) => {
    const line = data.lines[number];
    const label = document.createElement("label");
    const box = document.createElement("input");
    box.type = "checkbox";
    box.checked = !hidden.has(line.label);
    box.addEventListener("change", () => {
      if (box.checked) hidden.delete(line.label);
      else hidden.add(line.label);
      redraw();
    });
    const name = document.createElement("span");
    name.textContent = line.label;
    label.append(box, swatch(colourOf(line), line.dash, line.symbol), name);
    return label;
  });
  element("lines").replaceChildren(element("lines").firstElementChild, ...boxes);
  element("lines").hidden = boxes.length === 0;
}

// The sign of a line as in the figures: its dashes and its marker, of which one may be null.
function swatch(colour, dash, symbol) {
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  for (const [key, value] of Object.entries({ width: 34, height: 14, "aria-hidden": "true" }))
    svg.setAttribute(key, value);
  const stroke = document.createElementNS(space, "path");
  const dashes = { solid: "", dash: "6 4", dashdot: "7 3 2 3", dot: "2 3" }[dash];
  const marks = {
    circle: "M13 7a4 4 0 1 0 8 0a4 4 0 1 0-8 0",
    square: "M13 3h8v8h-8z",
    "triangle-up": "M17 2l5 9h-10z",
    diamond: "M17 1l5 6l-5 6l-5-6z",
    "triangle-down": "M17 12l5-9h-10z",
    x: "M13 5l2-2l2 2l2-2l2 2l-2 2l2 2l-2 2l-2-2l-2 2l-2-2l2-2z",
    cross: "M15.5 2h3v3.5h3.5v3h-3.5v3.5h-3v-3.5h-3.5v-3h3.5z",
    star: "M17 1l1.7 4h4.3l-3.4 2.7l1.3 4.3l-3.9-2.5l-3.9 2.5l1.3-4.3l-3.4-2.7h4.3z",
    "triangle-left": "M12 7l9-5v10z",
    "triangle-right": "M22 7l-9-5v10z",
    "diamond-tall": "M17 1l3.5 6l-3.5 6l-3.5-6z",
    pentagon: "M17 2l5 3.7l-1.9 6h-6.2l-1.9-6z",
    octagon: "M15.2 2.5h3.6l2.7 2.7v3.6l-2.7 2.7h-3.6l-2.7-2.7v-3.6z",
    hexagon: "M13 5l4-3l4 3v4l-4 3l-4-3z",
  };
  stroke.setAttribute("d", dash ? "M0 7H34" : "");
  stroke.setAttribute("stroke", colour);
  stroke.setAttribute("stroke-width", "2");
  stroke.setAttribute("stroke-dasharray", dashes ?? "");
  const mark = document.createElementNS(space, "path");
  mark.setAttribute("d", marks[symbol] ?? "");
  mark.setAttribute("fill", colour);
  svg.append(stroke, mark);
  return svg;
}

function offerSizes() {
  const panels = shownPanels();
  const sizes = [...new Set(data.cells.filter((c) => panels.includes(c.panel)).map((c) => c.size))];
  const options = sizes.sort((a, b) => a - b).map((size) => [String(size), String(size)]);
  offer("size", options, chosen("size"));
}

function offerEvaluated() {
  const panels = shownPanels();
  const cells = [...new Set(data.evaluations.map((entry) => entry.cell))].filter((cell) =>
    panels.includes(data.cells[cell].panel),
  );
  const options = cells.map((i) => {
    const cell = data.cells[i];
    const name = `${data.lines[cell.line].label}, batch size ${cell.size}`;
    return [String(i), panels.length > 1 ? `${panelTitle(data.panels[cell.panel])}: ${name}` : name];
  });
  offer("evaluated", options, chosen("evaluated"));
  for (const part of document.querySelectorAll("[data-if=evaluations]"))
    part.hidden = cells.length === 0;
}

// A good error to ask for: the largest of the best that the runs reach, rounded up.
function reachable() {
  const best = Object.values(data.curves.runs)
    .map((run) => Math.min(...run.test_error.filter((value) => value !== null)))
    .filter(Number.isFinite)
    .sort((a, b) => a - b);
  if (best.length === 0) return 20;
  return Math.min(100, Math.ceil(2 * best[Math.floor(0.9 * (best.length - 1))]) / 2 + 0.5);
}

function controls() {
  return [...document.querySelectorAll("main select, main input[id]")];
}

// Choices that are not the first ones stand in the address, so that a link shows the same.
function rememberChoices() {
  const words = new URLSearchParams();
  for (const control of controls()) {
    const value = String(chosen(control.id));
    if (value !== defaults[control.id]) words.set(control.id, value);
  }
  if (hidden.size) words.set("off", JSON.stringify([...hidden]));
  try {
    const address = location.href.split("#")[0];
    const old = location.hash.slice(1);
    const isSection = old && element(old);
    if (String(words) || !isSection)
      history.replaceState(null, "", String(words) ? `${address}#${words}` : address);
  } catch {
    // A browser that does not allow it for files: the page works without.
  }
}

function recallChoices() {
  const words = new URLSearchParams(location.hash.slice(1));
  for (const id of ["study", "panel", "axis", ...controls().map((control) => control.id)]) {
    if (!words.has(id) || !element(id)) continue;
    const control = element(id);
    const value = words.get(id);
    if (control.type === "checkbox") control.checked = value === "true";
    else if (control.tagName !== "SELECT") control.value = value;
    else if ([...control.options].some((option) => option.value === value)) control.value = value;
    if (id === "study") offerEverything();
  }
  try {
    for (const label of JSON.parse(words.get("off") ?? "[]")) hidden.add(String(label));
  } catch {
    // Not an address of this page.
  }
}

function offerEverything(panel) {
  offerPanels(panel);
  offerAxes();
  offerLines();
  offerSizes();
  offerEvaluated();
}

function redraw() {
  const studies = shownStudies();
  for (const part of document.querySelectorAll("[data-study]"))
    part.hidden = !studies.includes(Number(part.dataset.study));
  element("order").disabled = !["size", "setting"].includes(chosen("axis"));
  element("published").disabled = !data.panels.some((panel) => panel.published.length);
  drawFigure();
  drawCurves();
  drawMemory();
  drawEvaluations();
  rememberChoices();
}

function start() {
  const names = data.studies.map((study, i) => [String(i), study.name]);
  offer("study", names.length > 1 ? [["all", "all"], ...names] : names);
  element("study-menu").hidden = names.length < 2;
  offer("metric", data.metrics.map((metric) => [metric.key, metric.name]));
  element("order").value = data.order;
  element("target").value = reachable();
  const known = (key) => data.cells.some((cell) => cell.x[key] !== null);
  offer("held", ["bytes", "peak"].filter(known).map((key) => [key, AXES[key]]));
  offerEverything();
  for (const control of controls()) defaults[control.id] = String(chosen(control.id));
  recallChoices();
  offerLines();
  for (const control of controls()) {
    const typed = control.tagName === "INPUT" && control.type !== "checkbox";
    control.addEventListener(typed ? "input" : "change", () => {
      if (control.id === "study") offerEverything();
      if (control.id === "panel") offerEverything(chosen("panel"));
      if (control.id === "axis") offerLines();
      if (["study", "filter"].includes(control.id)) drawRuns();
      if (control.id === "filter") rememberChoices();
      else redraw();
    });
  }
  const recolour = () => {
    offerLines();
    redraw();
  };
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", recolour);
  // On paper: light, and with all that can be unfolded.
  const folded = new Set();
  addEventListener("beforeprint", () => {
    document.documentElement.dataset.light = "";
    for (const details of document.querySelectorAll("details:not([open])")) {
      folded.add(details);
      details.open = true;
    }
    recolour();
  });
  addEventListener("afterprint", () => {
    delete document.documentElement.dataset.light;
    for (const details of folded) details.open = false;
    folded.clear();
    recolour();
  });
  drawRuns();
  redraw();
}

start();
