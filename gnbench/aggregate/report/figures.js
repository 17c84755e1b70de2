// The figures, drawn by plotly.js. Statistics are not computed here: they stand in the data.

const MIB = 2 ** 20;
const SETTINGS = { displaylogo: false, responsive: true, modeBarButtonsToRemove: ["toImage", "lasso2d", "select2d", "autoScale2d"] };
// Plotly 4 would offer to send the data to a server of its own.
Object.assign(SETTINGS, { showSendToCloud: false, plotlyServerURL: "" });
// A finger cannot hover: the bar would always be there, and a drag zoom in place of the page's scroll.
const TOUCHED = matchMedia("(hover: none)").matches;
SETTINGS.displayModeBar = TOUCHED ? false : "hover";
SETTINGS.modeBarButtonsToAdd = [{ name: "Save as SVG", icon: Plotly.Icons.camera, click: savePicture }];

function isDark() {
  const printed = "light" in document.documentElement.dataset;
  return matchMedia("(prefers-color-scheme: dark)").matches && !printed;
}

function colourOf(line) {
  return isDark() ? line.dark : line.colour;
}

function style(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

function faded(colour, share) {
  const parts = [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));
  return `rgba(${parts.join(",")},${share})`;
}

// Plotly takes texts for a kind of HTML.
function plain(text) {
  return String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
}

// A legend of plotly's own, at the foot of a picture that is high enough for it.
function savePicture(plot) {
  const named = plot.data.filter((trace) => trace.name).map((trace) => trace.name.length);
  const columns = Math.max(1, Math.floor(680 / (60 + 8 * Math.max(0, ...named))));
  const foot = 20 * Math.ceil(named.length / columns) + 20;
  const layout = {
    ...plot.layout,
    showlegend: true,
    legend: { orientation: "h", yref: "container", y: 0, yanchor: "bottom", maxheight: foot },
    paper_bgcolor: style("paper"),
    margin: { ...plot.layout.margin, b: foot + 60 },
  };
  const data = plot.data.map((trace) => ({ ...trace, name: plain(trace.name ?? "") }));
  Plotly.downloadImage({ data, layout }, { format: "svg", width: 720, height: 460 + foot, filename: "gnbench" });
}

// The lines of a plot by their signs, beneath it: plotly's legend would cover the title of the axis.
function keyOf(traces) {
  const key = document.createElement("ul");
  key.className = "key";
  for (const { name, mode, line, marker } of traces.filter((trace) => trace.name)) {
    const item = document.createElement("li");
    const text = document.createElement("span");
    text.textContent = name;
    const dash = mode.includes("lines") ? (line.dash ?? "solid") : null;
    const symbol = mode.includes("markers") ? marker.symbol : null;
    item.append(swatch(line?.color ?? marker.color, dash, symbol), text);
    key.append(item);
  }
  return key;
}

function layoutOf(title, x, y) {
  const axis = { gridcolor: style("grid"), zeroline: false, linecolor: style("grid"), automargin: true };
  return {
    title: { text: plain(title), font: { size: 15 }, x: 0.02, xanchor: "left" },
    font: { color: style("ink"), family: "system-ui, sans-serif", size: 13 },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    modebar: { bgcolor: style("paper"), color: style("faint"), activecolor: style("ink") },
    dragmode: TOUCHED ? false : "zoom",
    hoverlabel: { bgcolor: style("paper"), font: { color: style("ink") }, align: "left" },
    margin: { l: 50, r: 14, t: 44, b: 48 },
    showlegend: false,
    hovermode: "closest",
    xaxis: { ...axis, ...x, title: { text: plain(x.title) } },
    yaxis: { ...axis, ...y, title: { text: plain(y.title) } },
  };
}

// Puts plots into the place of that name: each has a title, traces and a layout. Where the boxes
// do not stand right above, or name other lines, each has a key.
function putPlots(name, plots, nothing) {
  const place = document.querySelector(`[data-plots=${name}]`);
  while (place.children.length > plots.length) {
    Plotly.purge(place.lastElementChild.firstElementChild);
    place.lastElementChild.remove();
  }
  while (place.children.length < plots.length) {
    const plot = document.createElement("div");
    plot.className = "plot";
    plot.setAttribute("role", "img");
    const frame = document.createElement("div");
    frame.className = "frame";
    frame.append(plot);
    place.append(frame);
  }
  plots.forEach(({ title, traces, layout }, i) => {
    const [plot, key] = place.children[i].children;
    plot.setAttribute("aria-label", `${title}. The table beneath has its numbers.`);
    Plotly.react(plot, traces, layout, SETTINGS);
    key?.remove();
    if (name !== "figure") plot.after(keyOf(traces));
  });
  const note = document.querySelector(`[data-note=${name}]`);
  if (note && !plots.length) note.textContent = nothing;
  return note;
}

// An axis over values, a tick at each of `ticks` or at round numbers; a log one if they differ much.
function logAxis(values, title, ticks) {
  const low = Math.min(...values);
  const high = Math.max(...values);
  if (ticks === undefined) {
    if (high < 3 * low) return { title, tickformat: ",", nticks: 6 };
    ticks = [];
    const decades = Math.log10(high / low);
    const steps = decades > 2.5 ? [1] : decades > 1 ? [1, 2, 5] : [1, 2, 3, 5, 7];
    for (let power = Math.floor(Math.log10(low)) - 1; power <= Math.log10(high) + 1; power += 1)
      ticks.push(...steps.map((step) => Number((step * 10 ** power).toPrecision(6))));
  }
  const pad = Math.max(0.06 * Math.log10(high / low), 0.08);
  return {
    title,
    type: "log",
    range: [Math.log10(low) - pad, Math.log10(high) + pad],
    tickvals: ticks,
    ticktext: ticks.map((tick) => tick.toLocaleString("en", { maximumSignificantDigits: 6 })),
  };
}

// Where a cell stands on an axis: null if that is not known.
function positionOf(cell, axis) {
  if (axis === "size") return cell.size;
  const value = cell.x[axis];
  if (value === null || value === undefined || value <= 0) return null;
  return axis === "bytes" || axis === "peak" ? value / MIB : value;
}

function metricOf(key) {
  return data.metrics.find((metric) => metric.key === key);
}

function seedValues(cell, metric) {
  const column = data.runs.columns.find((one) => one.key === metric);
  return cell.runs.map((run) => (column?.numbers ? column.numbers[run] : null));
}

function intervalText(low, high) {
  return low === null || low === undefined ? "no interval" : `95 %: ${low.toFixed(2)} to ${high.toFixed(2)}`;
}

function hoverOf(cell, axis, metric) {
  const [mean, low, high] = cell.m[metric];
  const seeds = `${cell.runs.length} ${cell.runs.length === 1 ? "seed" : "seeds"}`;
  const where = axis === "size" ? "" : `<br>${plain(axisName(axis))}: ${positionOf(cell, axis).toPrecision(4)}`;
  const bad = cell.diverged ? `<br>${cell.diverged} diverged` : "";
  return `<b>${plain(data.lines[lineOf(cell)].label)}</b>, batch size ${cell.size}${where}<br>` +
    `${mean.toFixed(2)} (${intervalText(low, high)}; ${seeds})${bad}`;
}

function axisName(axis) {
  if (axis !== "setting") return AXES[axis];
  return data.studies[data.panels[shownPanels()[0]].study].setting;
}

function groupsOf(cells, lineOfCell) {
  const groups = new Map();
  for (const cell of cells) {
    const line = lineOfCell(cell);
    groups.set(line, [...(groups.get(line) ?? []), cell]);
  }
  return groups;
}

// The traces of a line: its interval as a band or as bars, its seeds, its means.
function tracesOf(line, cells, axis, metric, colour) {
  const x = cells.map((cell) => positionOf(cell, axis));
  const mean = cells.map((cell) => cell.m[metric][0]);
  const low = cells.map((cell, i) => cell.m[metric][1] ?? mean[i]);
  const high = cells.map((cell, i) => cell.m[metric][2] ?? mean[i]);
  const known = cells.some((cell) => cell.m[metric][1] !== null);
  const traces = [];
  const asBand = ["size", "setting"].includes(axis) && cells.length > 1;
  if (chosen("intervals") && known && asBand)
    traces.push({
      x: [...x, ...[...x].reverse()], y: [...high, ...[...low].reverse()],
      fill: "toself", fillcolor: faded(colour, 0.18), line: { width: 0 }, mode: "lines",
      hoverinfo: "skip", showlegend: false,
    });
  if (chosen("seeds"))
    traces.push({
      x: cells.flatMap((cell, i) => cell.runs.map(() => x[i])),
      y: cells.flatMap((cell) => seedValues(cell, metric)),
      text: cells.flatMap((cell) => cell.runs.map((run) => plain(data.runs.id[run]))),
      hovertemplate: "%{text}<br>%{y}<extra></extra>",
      mode: "markers", marker: { color: colour, size: 5, opacity: 0.45 }, showlegend: false,
    });
  traces.push({
    x, y: mean, name: line.label, mode: "lines+markers",
    text: cells.map((cell) => hoverOf(cell, axis, metric)), hovertemplate: "%{text}<extra></extra>",
    line: { color: colour, dash: line.dash, width: 2 },
    marker: { color: colour, symbol: line.symbol, size: 9 },
    error_y: {
      type: "data", visible: chosen("intervals") && known && !asBand, color: colour, thickness: 1.5,
      array: high.map((value, i) => value - mean[i]), arrayminus: low.map((value, i) => mean[i] - value),
    },
  });
  return traces;
}

// Published values: hollow markers in the colour of the norm, a baseline as a dotted line.
function publishedTraces(panel, span) {
  return panel.published.map((series) => {
    const text = `${plain(series.label)}: %{y:.2f}<extra></extra>`;
    if (!series.batch_size) {
      const [error] = series.test_error;
      return { x: span, y: [error, error], mode: "lines", name: series.label, hovertemplate: text, line: { color: style("faint"), dash: "dot", width: 1.5 } };
    }
    return {
      x: series.batch_size, y: series.test_error, mode: "markers", name: series.label, hovertemplate: text,
      marker: { color: colourOf(series), symbol: `${series.symbol}-open`, size: 10, line: { width: 1.5 } },
    };
  });
}

// The baseline of a panel: the single cell of another model, as a dashed line.
function baselineTraces(panel, metric, span) {
  return data.cells
    .filter((cell) => {
      const other = data.panels[cell.panel];
      return other.beside && other !== panel && other.study === panel.study && other.dataset === panel.dataset && cell.m[metric];
    })
    .map((cell) => {
      const [mean] = cell.m[metric];
      const label = `${data.panels[cell.panel].model} ${data.lines[cell.line].label}, batch size ${cell.size}`;
      return { x: span, y: [mean, mean], mode: "lines", name: label, hovertemplate: `${plain(label)}: %{y:.2f}<extra></extra>`, line: { color: style("faint"), dash: "dash", width: 1.5 } };
    });
}

// A run that diverged errs so much that nothing else could be told apart: its cell may lie outside.
function frameOf(cells, metric, others, notes) {
  const diverged = cells.filter((cell) => cell.diverged);
  const sound = cells.filter((cell) => !cell.diverged);
  if (!diverged.length || !sound.length) return {};
  const values = [...others, ...sound.flatMap((cell) => cell.m[metric])].filter((value) => value !== null);
  if (chosen("seeds")) values.push(...sound.flatMap((cell) => seedValues(cell, metric)).filter(Number.isFinite));
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const pad = 0.08 * (high - low) || 1;
  const outside = diverged.filter((cell) => cell.m[metric][0] > high + pad || cell.m[metric][0] < low - pad);
  const names = outside.map((cell) => `${data.lines[cell.line].label} at ${cell.size} (${cell.m[metric][0].toFixed(2)})`);
  if (names.length) notes.add(`Outside the frame, since runs diverged: ${names.join("; ")}.`);
  return { range: [low - pad, high + pad] };
}

function drawFigure() {
  const [axis, metric] = [chosen("axis"), chosen("metric")];
  const name = metricOf(metric)?.name ?? "";
  const rows = [];
  const notes = new Set();
  const plots = shownPanels().flatMap((number) => {
    const panel = data.panels[number];
    const cells = cellsOf(number).filter((cell) => cell.m[metric] && positionOf(cell, axis) !== null);
    if (!cells.length) return [];
    const overlaid = chosen("published") && axis === "size" && metric.startsWith("test_error");
    const published = overlaid ? panel.published : [];
    const ticks = new Set(cells.map((cell) => positionOf(cell, axis)));
    for (const series of published) for (const size of series.batch_size ?? []) ticks.add(size);
    const values = [...ticks];
    const exact = ["size", "setting"].includes(axis);
    const x = logAxis(values, axisName(axis), exact ? values : undefined);
    if (exact && chosen("order") === "descending" && x.range) x.range.reverse();
    const span = x.range ? x.range.map((power) => 10 ** power) : [];
    const traces = [...baselineTraces(panel, metric, exact ? span : []), ...(overlaid ? publishedTraces(panel, span) : [])];
    if (traces.length) notes.add("Dashed or dotted gray: the baseline.");
    if (published.length) notes.add(`Hollow: ${[...new Set(published.filter((s) => s.batch_size).map((s) => s.label))].join("; ")}.`);
    for (const [line, own] of groupsOf(cells, lineOf)) {
      own.sort((a, b) => (axis === "setting" ? a.x.setting - b.x.setting : a.size - b.size));
      traces.push(...tracesOf(data.lines[line], own, axis, metric, colourOf(data.lines[line])));
      for (const cell of own) {
        const [mean, low, high] = cell.m[metric];
        rows.push([panelTitle(panel), data.lines[cell.line].label, cell.size, ...(exact ? [] : [Number(positionOf(cell, axis).toPrecision(4))]), mean, intervalText(low, high), cell.runs.length, cell.diverged]);
      }
    }
    const title = panelTitle(panel);
    const others = traces.filter((trace) => trace.mode === "lines" || trace.marker?.symbol?.endsWith("-open"));
    const frame = frameOf(cells, metric, others.flatMap((trace) => (trace.fill ? [] : trace.y)), notes);
    const layout = layoutOf(title, x, { ...frame, title: metricOf(metric).short });
    return [{ title: `${title}: ${name} against ${axisName(axis)}`, traces, layout }];
  });
  const why = data.cells.length ? "This is not recorded, or no line is switched on" : "No run is finished";
  const note = putPlots("figure", plots, `${why}: there is nothing to draw.`);
  const short = plots.length ? metricOf(metric).short.replace(" (%)", "") : "error";
  element("figure-title").textContent = `${short[0].toUpperCase()}${short.slice(1)} against ${axisName(axis)}`;
  if (plots.length) {
    const spread = metricOf(metric).pooled ? "of the mean over seeds, by the variance pooled over the cells of a network" : "of the mean over the seeds of each cell by itself";
    note.textContent = `Intervals: 95 %, ${spread}; none with a single seed. Faint: single seeds. ${[...notes].join(" ")}`;
  }
  const heads = ["network", "line", "batch size", ...(["size", "setting"].includes(axis) ? [] : [axisName(axis)]), "mean", "interval", "seeds", "diverged"];
  putTable("figure", name, heads, rows);
}

function drawMemory() {
  const [axis, metric] = [chosen("held"), chosen("metric")];
  const name = metricOf(metric)?.name ?? "";
  const rows = [];
  const notes = new Set();
  const plots = (axis ? shownPanels() : []).flatMap((number) => {
    const cells = cellsOf(number).filter((cell) => cell.m[metric] && positionOf(cell, axis) !== null);
    if (!cells.length) return [];
    const title = panelTitle(data.panels[number]);
    const traces = [...groupsOf(cells, (cell) => cell.line)].map(([line, own]) => {
      const colour = colourOf(data.lines[line]);
      const trace = tracesOf(data.lines[line], own, axis, metric, colour).at(-1);
      const labels = own.map((cell) => String(cell.size));
      return { ...trace, error_y: undefined, mode: "lines+markers+text", hovertext: trace.text, text: labels, textposition: "top center", hovertemplate: "%{hovertext}<extra></extra>" };
    });
    for (const cell of cells)
      rows.push([title, data.lines[cell.line].label, cell.size, Number(positionOf(cell, axis).toPrecision(4)), cell.m[metric][0]]);
    const x = logAxis(cells.map((cell) => positionOf(cell, axis)), AXES[axis]);
    return [{ title: `${title}: ${name} against ${AXES[axis]}`, traces, layout: layoutOf(title, x, { ...frameOf(cells, metric, [], notes), title: metricOf(metric).short }) }];
  });
  const note = putPlots("memory", plots, "No memory is recorded for these runs; python -m gnbench.memory measures it.");
  if (plots.length) note.textContent = `At each point stands its batch size. To the left and below is better. ${[...notes].join(" ")}`;
  putTable("memory", `${name} and memory`, ["network", "line", "batch size", AXES[axis], "mean"], rows);
}

function epochsOf(curve) {
  return curve.epoch ?? curve.test_error.map((_, i) => i + 1);
}

function abscissaOf(curve, over) {
  if (over === "seconds") return curve.seconds;
  return epochsOf(curve).map((epoch) => (over === "steps" ? epoch * curve.steps : epoch));
}

function median(values) {
  const sorted = [...values].sort((a, b) => a - b);
  const half = sorted.length >> 1;
  return sorted.length % 2 ? sorted[half] : (sorted[half - 1] + sorted[half]) / 2;
}

function drawCurves() {
  const [size, curve, over, target] = [Number(chosen("size")), chosen("curve"), chosen("over"), Number(chosen("target"))];
  const names = { epoch: "epochs", steps: "optimizer steps", seconds: "seconds" };
  const option = element("curve").selectedOptions[0].textContent;
  const rows = [];
  const plots = shownPanels().flatMap((number) => {
    const title = panelTitle(data.panels[number]);
    for (const cell of cellsOf(number)) rows.push(timeTo(target, title, cell));
    const cells = cellsOf(number).filter((cell) => cell.size === size);
    const traces = cells.flatMap((cell) => curvesOf(cell, curve, over));
    if (!traces.length) return [];
    const layout = layoutOf(`${title}, batch size ${size}`, { title: names[over] }, { title: option });
    if (curve === "test_error" && chosen("target") !== "")
      layout.shapes = [{ type: "line", xref: "paper", x0: 0, x1: 1, y0: target, y1: target, line: { color: style("faint"), dash: "dot", width: 1 } }];
    return [{ title: `${title}, batch size ${size}: ${option} over ${names[over]}`, traces, layout }];
  });
  const note = putPlots("curves", plots, "There are no epochs to draw.");
  const thinned = data.curves.stride > 1 ? ` Of so many epochs one in ${data.curves.stride} is here, and the last.` : "";
  if (plots.length) note.textContent = `Bold: the mean over seeds; thin: each seed. Dotted: the error to reach. The table is for all batch sizes: the first epoch at whose end a run is there, medians over the runs that get there.${thinned}`;
  const heads = ["network", "line", "batch size", "runs that get there", "epochs", "steps", "seconds"];
  putTable("curves", `Time to a test error of ${target} %`, heads, chosen("target") === "" ? [] : rows);
}

function curvesOf(cell, curve, over) {
  const line = data.lines[cell.line];
  const colour = colourOf(line);
  const runs = cell.runs.map((run) => data.curves.runs[run]).filter(Boolean);
  if (!runs.length) return [];
  const seeds = { x: [], y: [], mode: "lines", line: { color: faded(colour, 0.4), width: 1 }, hoverinfo: "skip", showlegend: false };
  for (const run of runs) {
    seeds.x.push(...abscissaOf(run, over), null);
    seeds.y.push(...run[curve], null);
  }
  const shared = runs.reduce((a, b) => (a.test_error.length <= b.test_error.length ? a : b));
  const everywhere = epochsOf(shared).map((epoch) => runs.map((run) => epochsOf(run).indexOf(epoch)));
  const kept = everywhere.filter((at) => at.every((i, r) => i >= 0 && runs[r][curve][i] !== null));
  const mean = (of) => kept.map((at) => at.reduce((sum, i, r) => sum + of(runs[r])[i], 0) / runs.length);
  const bold = {
    x: mean((run) => abscissaOf(run, over)), y: mean((run) => run[curve]), name: line.label,
    mode: kept.length > 1 ? "lines" : "markers", line: { color: colour, dash: line.dash, width: 2.5 },
    marker: { color: colour, symbol: line.symbol }, hovertemplate: `${plain(line.label)}: %{y:.2f}<extra></extra>`,
  };
  return runs.length > 1 ? [seeds, bold] : [bold];
}

function timeTo(target, title, cell) {
  const there = cell.runs.flatMap((run) => {
    const curve = data.curves.runs[run];
    const at = curve ? curve.test_error.findIndex((error) => error !== null && error <= target) : -1;
    return at < 0 ? [] : [[epochsOf(curve)[at], epochsOf(curve)[at] * curve.steps, curve.seconds[at]]];
  });
  const medians = [0, 1, 2].map((i) => (there.length ? Math.round(median(there.map((t) => t[i])) * 10) / 10 : null));
  return [title, data.lines[cell.line].label, cell.size, `${there.length} of ${cell.runs.length}`, ...medians];
}

function drawEvaluations() {
  const number = Number(chosen("evaluated"));
  const panels = shownPanels();
  const all = data.evaluations.filter((entry) => panels.includes(data.cells[entry.cell].panel));
  const own = all.filter((entry) => entry.cell === number && chosen("evaluated") !== "");
  const looks = { batch: ["#0072B2", "circle"], precise: ["#D62728", "square"], population: ["#009E73", "diamond"], evalnorm: ["#E69F00", "triangle-up"] };
  const traces = Object.entries(looks).flatMap(([name, [colour, symbol]]) => {
    const points = own.filter((entry) => entry.statistics === name && entry.images).sort((a, b) => a.images - b.images);
    if (!points.length) return [];
    return [{ x: points.map((p) => p.images), y: points.map((p) => p.error), name, mode: "lines+markers", marker: { symbol, size: 8, color: colour }, line: { color: colour }, hovertemplate: `${name}, %{x} images: %{y:.2f} %<extra></extra>` }];
  });
  const values = own.flatMap((entry) => entry.images ?? []);
  const ema = own.find((entry) => entry.statistics === "ema");
  if (ema && values.length) {
    const span = [Math.min(...values) / 1.3, Math.max(...values) * 1.3];
    traces.push({ x: span, y: [ema.error, ema.error], name: "ema", mode: "lines", line: { color: style("ink"), dash: "dash" }, hovertemplate: "ema: %{y:.2f} %<extra></extra>" });
  }
  const plots = [];
  if (traces.length) {
    const cell = data.cells[number];
    const title = `${data.lines[cell.line].label}, batch size ${cell.size}`;
    const layout = layoutOf(title, logAxis(values, "images normalized together", [...new Set(values)]), { title: "test error (%)" });
    plots.push({ title: `${title}: test error by the statistics at evaluation`, traces, layout });
  }
  putPlots("evaluations", plots, "");
  const cells = [...new Set(all.map((entry) => entry.cell))];
  const order = ["ema", "precise", "population", "evalnorm"];
  const columns = [...new Set(all.filter((e) => e.statistics === "batch").map((e) => e.images))].sort((a, b) => a - b);
  const rows = cells.map((i) => {
    const of = all.filter((entry) => entry.cell === i);
    const error = (name, fits) => of.find((entry) => entry.statistics === name && fits(entry))?.error ?? null;
    return [panelTitle(data.panels[data.cells[i].panel]), data.lines[data.cells[i].line].label, data.cells[i].size, Math.max(...of.map((e) => e.seeds)),
      ...order.map((name) => error(name, (entry) => name === "ema" || entry.own)), ...columns.map((n) => error("batch", (entry) => entry.images === n))];
  });
  const heads = ["network", "line", "batch size", "seeds", ...order, ...columns.map((n) => `batch ${n}`)];
  putTable("evaluations", "Test error (%), all but batch over the images of the training", heads, rows);
}
