// Tables: those that say in numbers what the figures draw, and that of the runs.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
unfoldCurves();
const sorting = { column: null, descending: false };

// Curves are written as steps from one value to the next in a unit.
function unfoldCurves() {
  const { runs, units } = data.curves;
  const unfold = (steps, unit) => {
    let last = 0;
    return steps.map((step) => {
      if (step === null) return null;
      last += step;
      return Number((last * unit).toPrecision(9));
    });
  };
  for (const run of Object.values(runs)) {
    for (const [name, unit] of Object.entries(units)) run[name] = unfold(run[name], unit);
    run.seconds = unfold(run.seconds, run.unit);
  }
}

function cellOfTable(tag, text, number) {
  const cell = document.createElement(tag);
  cell.textContent = text;
  if (number) cell.className = "number";
  if (tag === "th") cell.scope = "col";
  return cell;
}

// A table of texts and numbers; numbers are set to the right.
function makeTable(caption, heads, rows) {
  const table = document.createElement("table");
  const title = document.createElement("caption");
  title.textContent = caption;
  const head = document.createElement("thead");
  const numbers = heads.map((_, i) => rows.some((row) => typeof row[i] === "number"));
  const line = head.insertRow();
  line.append(...heads.map((text, i) => cellOfTable("th", text, numbers[i])));
  const body = document.createElement("tbody");
  for (const row of rows) {
    const filled = row.map((value, i) => cellOfTable("td", value ?? "–", numbers[i]));
    body.insertRow().append(...filled);
  }
  table.append(title, head, body);
  const frame = document.createElement("div");
  frame.className = rows.length > 20 ? "wide tall" : "wide";
  frame.tabIndex = 0;
  frame.setAttribute("role", "region");
  frame.setAttribute("aria-label", caption);
  frame.append(table);
  return frame;
}

function putTable(name, caption, heads, rows) {
  const place = document.querySelector(`[data-table=${name}]`);
  place.replaceChildren(...(rows.length ? [makeTable(caption, heads, rows)] : []));
}

// The value of a run in a column: a number, a text, or null.
function valueOf(column, run) {
  if (column.numbers) return column.numbers[run];
  return column.texts[column.of[run]] || null;
}

function compareValues(a, b) {
  if (typeof a === "number" && typeof b === "number") return a - b;
  return String(a).localeCompare(String(b), "en", { numeric: true });
}

// The runs that are shown: of the chosen study, with all words that were typed, sorted.
function shownRuns() {
  const { study, id, columns } = data.runs;
  const studies = shownStudies();
  const words = chosen("filter").toLowerCase().split(/\s+/).filter(Boolean);
  const runs = id.map((_, i) => i).filter((i) => {
    if (!studies.includes(study[i])) return false;
    if (words.length === 0) return true;
    const text = [id[i], ...columns.map((c) => valueOf(c, i) ?? "")].join(" ").toLowerCase();
    return words.every((word) => text.includes(word));
  });
  const column = columns.find((one) => one.key === sorting.column);
  if (column === undefined) return runs.sort((a, b) => compareValues(id[a], id[b]));
  const sign = sorting.descending ? -1 : 1;
  return runs.sort((a, b) => {
    const [x, y] = [valueOf(column, a), valueOf(column, b)];
    if (x === null || y === null) return (x === null) - (y === null); // unknown ones last
    return sign * compareValues(x, y);
  });
}

function link(address, text) {
  const anchor = document.createElement("a");
  anchor.href = address;
  anchor.textContent = text;
  return anchor;
}

function shortNumber(value) {
  if (Number.isInteger(value)) return String(value);
  return String(Number(value.toPrecision(5)));
}

function headOfRuns(columns) {
  const row = document.createElement("tr");
  for (const column of columns) {
    const head = cellOfTable("th", "", column.numbers);
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = column.title;
    const own = sorting.column === column.key;
    head.setAttribute("aria-sort", own ? (sorting.descending ? "descending" : "ascending") : "none");
    button.addEventListener("click", () => {
      sorting.descending = sorting.column === column.key && !sorting.descending;
      sorting.column = column.key;
      drawRuns();
      document.querySelector(`[data-table=runs] th[aria-sort$=ending] button`).focus();
    });
    head.append(button);
    row.append(head);
  }
  row.append(cellOfTable("th", "directory"));
  return row;
}

function drawRuns() {
  const { id, link: links, log, columns } = data.runs;
  const runs = shownRuns();
  const table = document.createElement("table");
  const body = document.createElement("tbody");
  for (const run of runs) {
    const row = document.createElement("tr");
    for (const column of columns) {
      const value = valueOf(column, run);
      const text = value === null ? "–" : typeof value === "number" ? shortNumber(value) : value;
      const cell = cellOfTable("td", text, column.numbers);
      if (text.length > 40) cell.className = "long";
      row.append(cell);
    }
    const directory = document.createElement("td");
    directory.append(links[run] ? link(links[run], id[run]) : id[run]);
    if (log[run]) directory.append(" ", link(`${links[run]}gnbench.log`, "log"));
    row.append(directory);
    body.append(row);
  }
  const head = document.createElement("thead");
  head.append(headOfRuns(columns));
  table.append(head, body);
  document.querySelector("[data-table=runs]").replaceChildren(...(id.length ? [table] : []));
  element("count").textContent = `${runs.length} of ${id.length} runs`;
}
