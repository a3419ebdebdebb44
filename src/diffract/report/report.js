"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const rows = data.rows, count = rows.name.length;
  const by = (id) => document.getElementById(id);
  const safe = (text) => String(text).replace(/[&<>"']/g, (c) => `&#${c.charCodeAt(0)};`);
  const baseOf = new Map(data.models.map((m) => [m.model, m.base]));
  const config = { displaylogo: false, responsive: true, showSendToCloud: false, plotlyServerURL: "", modeBarButtonsToRemove: ["lasso2d", "select2d"] };
  const state = { metric: data.first, model: null, name: null, part: "", sort: "name", up: true, filter: "" };

  const curves = new Map();
  for (const [model, name, quantity, length, packed] of data.curves) curves.set(JSON.stringify([model, name, quantity]), { length, packed });

  function unpack(model, name, quantity) {
    const found = curves.get(JSON.stringify([model, name, quantity]));
    if (!found) return { x: [], y: [] };
    const bytes = Uint8Array.from(atob(found.packed), (c) => c.charCodeAt(0));
    const y = Array.from(new Float32Array(bytes.buffer));
    const last = Math.max(1, y.length - 1);
    return { x: y.map((_, i) => 1 + Math.round((i * (found.length - 1)) / last)), y };
  }

  const figure = (kind) => structuredClone(data.figures[kind]);
  const format = (v) => (v === null || v === undefined ? "" : typeof v === "number" ? String(+v.toPrecision(5)) : String(v));
  const column = (i) => [["e", rows.expert[i]], ["", rows.head[i] ?? rows.kv_head[i]]].find(([, v]) => v !== null && v !== undefined);

  function options(select, values, chosen, text = (v) => v) {
    select.replaceChildren(...values.map((value) => new Option(text(value), value, false, value === chosen)));
  }

  function own(model) {
    const found = [];
    for (let i = 0; i < count; i++) if (rows.model[i] === model) found.push(i);
    return found;
  }

  // Heatmaps: one panel per part that is cut into heads or experts, one for all whole matrices.
  function panels() {
    const groups = new Map();
    for (const i of own(state.model)) {
      if (rows.layer[i] === null) continue;
      const key = column(i) ? rows.part[i] : "";
      if (!groups.has(key)) groups.set(key, []);
      groups.get(key).push(i);
    }
    const rank = (part) => (part === "" ? 99 : "qkvo".indexOf(part.split(".").at(-1)) + (/[.][qkvo]$/.test(part) ? 0 : 50));
    return [...groups].sort(([a], [b]) => rank(a) - rank(b));
  }

  function grid(title, members) {
    const across = title === "" ? (i) => rows.part[i] : (i) => column(i).join("");
    const layers = [...new Set(members.map((i) => rows.layer[i]))].sort((a, b) => a - b);
    const columns = [...new Set(members.map(across))];
    if (title !== "") columns.sort((a, b) => parseInt(a.replace("e", "")) - parseInt(b.replace("e", "")));
    const z = layers.map(() => columns.map(() => null)), names = layers.map(() => columns.map(() => null));
    for (const i of members) {
      const y = layers.indexOf(rows.layer[i]), x = columns.indexOf(across(i));
      z[y][x] = rows[state.metric][i];
      names[y][x] = rows.name[i];
    }
    return { layers, columns, z, names };
  }

  function drawPanels() {
    const box = by("panels"), all = panels();
    box.replaceChildren();
    const values = all.flatMap(([, m]) => m.map((i) => rows[state.metric][i])).filter((v) => v !== null);
    for (const [title, members] of all) {
      const { layers, columns, z, names } = grid(title, members);
      const fig = figure("heatmap"), trace = fig.data[0];
      const what = title === "" ? "matrix" : columns.some((c) => c.startsWith("e")) ? "expert" : /[.][kv]$/.test(title) ? "kv head" : "head";
      Object.assign(trace, { z, x: columns.map(safe), y: layers.map(String) });
      trace.hovertemplate = `layer %{y}, ${what} %{x}<br>${safe(state.metric)} %{z:.4g}<extra></extra>`;
      if (by("shared").checked && values.length) Object.assign(trace, { zmin: values.reduce((a, b) => Math.min(a, b)), zmax: values.reduce((a, b) => Math.max(a, b)) });
      fig.layout.title.text = safe(title === "" ? "whole matrices" : title);
      fig.layout.xaxis.title.text = what;
      fig.layout.height = Math.min(620, Math.max(210, 110 + 15 * layers.length));
      const place = document.createElement("div");
      place.dataset.part = title;
      box.append(place);
      Plotly.newPlot(place, fig.data, fig.layout, config).then(() => {
        place.on("plotly_click", (event) => {
          const [y, x] = event.points[0].pointIndex ?? event.points[0].pointNumber;
          if (names[y][x]) { choose(names[y][x]); by("detail").scrollIntoView({ behavior: "smooth", block: "nearest" }); }
        });
      });
    }
    const text = data.glossary[state.metric];
    by("metric-text").textContent = text ? text.summary + (text.range ? `; range ${text.range}` : "") : "";
  }

  function row(model, name) {
    for (let i = 0; i < count; i++) if (rows.model[i] === model && rows.name[i] === name) return i;
    return -1;
  }

  function drawDetail() {
    const fig = figure("spectrum"), compared = data.kind !== "scan" && baseOf.get(state.model) !== state.model;
    const sources = [[baseOf.get(state.model), "sigma"], [state.model, "sigma"], [state.model, "delta_sigma"]];
    fig.data = fig.data.slice(0, compared ? 3 : 1).map((trace, k) => ({ ...trace, ...unpack(...[sources[k][0], state.name, sources[k][1]]) }));
    if (!compared) fig.data[0].name = "sigma";
    else if (data.kind === "trajectory") [baseOf.get(state.model), state.model].forEach((name, k) => { fig.data[k].name = safe(name); });
    fig.layout.title.text = "Singular values";
    Plotly.react(by("spectrum"), fig.data, fig.layout, config);
    const i = row(state.model, state.name);
    const facts = i < 0 ? [] : [`${rows.rows[i]} x ${rows.cols[i]}`, rows.status[i] || "ok", rows.method[i] ? `method ${rows.method[i]}` : ""];
    for (const metric of ["delta_relative", "value_share", "stable_rank", "left_agreement_mean", "intruders"])
      if (i >= 0 && rows[metric] && rows[metric][i] !== null) facts.push(`${metric} ${format(rows[metric][i])}`);
    by("matrix-text").textContent = facts.filter(Boolean).join(" · ");
    by("agreement").hidden = !compared;
    if (!compared) return;
    const agree = figure("agreement");
    for (const [k, side] of ["left", "right"].entries()) {
      Object.assign(agree.data[k], unpack(state.model, state.name, `${side}_agreement`));
      const level = i < 0 || !rows[`${side}_agreement_chance`] ? null : rows[`${side}_agreement_chance`][i];
      const last = agree.data[k].x.at(-1);
      Object.assign(agree.data[k + 2], level === null || !last ? { x: [], y: [] } : { x: [1, last], y: [level, level] });
    }
    agree.layout.title.text = "Agreement of singular vectors";
    Plotly.react(by("agreement"), agree.data, agree.layout, config);
  }

  function drawLayers() {
    const fig = figure("layers"), members = own(state.model).filter((i) => rows.layer[i] !== null && rows[state.metric][i] !== null && (!state.part || rows.part[i] === state.part));
    members.sort((a, b) => rows.layer[a] - rows.layer[b]);
    Object.assign(fig.data[0], { x: members.map((i) => String(rows.layer[i])), y: members.map((i) => rows[state.metric][i]), text: members.map((i) => safe(rows.name[i])) });
    fig.layout.yaxis.title.text = safe(state.metric);
    Plotly.react(by("violins"), fig.data, fig.layout, config);
  }

  // Tables
  function cell(value, numeric, tag = "td") {
    const made = document.createElement(tag);
    made.textContent = format(value);
    if (numeric) made.className = "num";
    return made;
  }

  function head(table, columns, sort, onsort, numeric) {
    const line = document.createElement("tr");
    for (const name of columns) {
      const th = cell("", numeric(name), "th"), button = document.createElement("button");
      button.type = "button";
      button.textContent = name;
      button.addEventListener("click", () => onsort(name));
      if (sort.sort === name) th.setAttribute("aria-sort", sort.up ? "ascending" : "descending");
      th.append(button);
      line.append(th);
    }
    table.tHead.replaceChildren(line);
  }

  function compare(a, b, up) {
    if (a === null || a === undefined || a === "") return 1;
    if (b === null || b === undefined || b === "") return -1;
    const order = typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), undefined, { numeric: true });
    return up ? order : -order;
  }

  const LABELS = ["name", "layer", "part", "head", "kv_head", "rows", "cols", "status"];
  const shown = () => [...LABELS.filter((c) => c !== "expert"), ...data.metrics.filter((m) => own(state.model).some((i) => rows[m][i] !== null))];
  const SHOWN_ROWS = 600;

  function members() {
    const wanted = state.filter.toLowerCase();
    const found = own(state.model).filter((i) => !wanted || `${rows.name[i]} ${rows.part[i]} ${rows.status[i]}`.toLowerCase().includes(wanted));
    return found.sort((a, b) => compare(rows[state.sort][a], rows[state.sort][b], state.up));
  }

  function drawTable() {
    const table = by("metrics-table"), columns = shown(), found = members();
    const numeric = (name) => !["name", "part", "status"].includes(name);
    head(table, columns, state, (name) => { state.up = state.sort === name ? !state.up : numeric(name) ? false : true; state.sort = name; drawTable(); }, numeric);
    table.tBodies[0].replaceChildren(...found.slice(0, SHOWN_ROWS).map((i) => {
      const line = document.createElement("tr");
      line.className = "pick";
      line.append(...columns.map((name) => cell(rows[name][i], numeric(name))));
      line.addEventListener("click", () => choose(rows.name[i]));
      return line;
    }));
    by("count").textContent = found.length > SHOWN_ROWS ? `${SHOWN_ROWS} of ${found.length} rows shown; the download has all` : `${found.length} rows`;
  }

  function quote(value) {
    let text = value === null || value === undefined ? "" : String(value);
    if (typeof value === "string" && /^[=+\-@\t\r]/.test(text)) text = `'${text}`;
    return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  }

  function download(file, columns, lines) {
    const text = [columns, ...lines].map((line) => line.map(quote).join(",")).join("\r\n");
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
    link.download = file;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }

  const tensors = { sort: "tensor", up: true };
  const TENSORS = ["model", "tensor", "shape", "dtype", "size_bytes", "outcome", "note"];
  function chosenTensors() {
    const wanted = by("outcome").value;
    const found = data.tensors.filter((t) => wanted === "" || (wanted === "!" ? t.outcome !== "analysed" : t.outcome === wanted));
    return found.sort((a, b) => compare(a[tensors.sort], b[tensors.sort], tensors.up));
  }

  function drawTensors() {
    const table = by("tensors-table"), numeric = (name) => name === "size_bytes";
    head(table, TENSORS, tensors, (name) => { tensors.up = tensors.sort === name ? !tensors.up : true; tensors.sort = name; drawTensors(); }, numeric);
    table.tBodies[0].replaceChildren(...chosenTensors().slice(0, SHOWN_ROWS).map((t) => {
      const line = document.createElement("tr");
      line.append(...TENSORS.map((name) => cell(t[name], numeric(name))));
      return line;
    }));
  }

  function choose(name) {
    state.name = name;
    by("matrix").value = name;
    drawDetail();
  }

  function chooseModel(model) {
    state.model = model;
    const indices = own(model), parts = [...new Set(indices.map((i) => rows.part[i]))];
    options(by("matrix"), indices.map((i) => rows.name[i]), state.name);
    options(by("part"), ["", ...parts], state.part, (p) => p || "all");
    if (!parts.includes(state.part)) state.part = "";
    const names = new Set(indices.map((i) => rows.name[i]));
    if (!names.has(state.name)) state.name = indices.length ? rows.name[indices.find((i) => column(i)) ?? indices[0]] : null;
    if (state.name !== null) by("matrix").value = state.name;
    drawPanels(); drawDetail(); drawLayers(); drawTable();
  }

  const pickable = data.models.map((m) => m.model);
  const first = data.models.find((m) => m.role === "tuned") ?? data.models.at(data.kind === "trajectory" ? -1 : 0);
  options(by("metric"), data.metrics, state.metric);
  options(by("model"), pickable, first.model);
  by("model-label").hidden = pickable.length < 2;
  options(by("outcome"), ["", "!", ...new Set(data.tensors.map((t) => t.outcome))], "!", (o) => (o === "" ? "all" : o === "!" ? "not analysed as usual" : o));
  by("metric").addEventListener("change", (e) => { state.metric = e.target.value; drawPanels(); drawLayers(); });
  by("model").addEventListener("change", (e) => chooseModel(e.target.value));
  by("matrix").addEventListener("change", (e) => choose(e.target.value));
  by("part").addEventListener("change", (e) => { state.part = e.target.value; drawLayers(); });
  by("shared").addEventListener("change", drawPanels);
  by("filter").addEventListener("input", (e) => { state.filter = e.target.value; drawTable(); });
  by("outcome").addEventListener("change", drawTensors);
  by("csv").addEventListener("click", () => download("metrics.csv", ["model", ...shown()], members().map((i) => [state.model, ...shown().map((c) => rows[c][i])])));
  by("tensors-csv").addEventListener("click", () => download("tensors.csv", TENSORS, chosenTensors().map((t) => TENSORS.map((c) => t[c]))));
  if (data.metrics.length) { chooseModel(first.model); drawTensors(); }
})();
