"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const rows = data.rows;
  const by = (id) => document.getElementById(id);
  const safe = (text) => String(text).replace(/[&<>"']/g, (c) => `&#${c.charCodeAt(0)};`);
  const baseOf = new Map(data.models.map((m) => [m.model, m.base]));
  const config = { displaylogo: false, responsive: true, showSendToCloud: false, plotlyServerURL: "", modeBarButtonsToRemove: ["lasso2d", "select2d"] };
  const state = { metric: data.first, model: null, name: null, part: "", sort: "name", up: true, filter: "" };

  const curves = new Map();
  const key = (...parts) => JSON.stringify(parts);
  for (const [model, name, quantity, length, packed] of data.curves) curves.set(key(model, name, quantity), { length, packed });
  const densities = new Map(data.densities.map(([model, name, parts]) => [key(model, name), parts]));
  const peaks = new Map(data.peaks.map(([model, name, runs]) => [key(model, name), runs]));
  const places = new Map(rows.name.map((name, i) => [key(rows.model[i], name), i]));
  const ofModel = new Map(data.models.map((m) => [m.model, []]));
  rows.model.forEach((model, i) => ofModel.get(model).push(i));

  const floats = (packed) => Array.from(new Float32Array(Uint8Array.from(atob(packed), (c) => c.charCodeAt(0)).buffer));

  function unpack(model, name, quantity) {
    const found = curves.get(key(model, name, quantity));
    if (!found) return { x: [], y: [] };
    const y = floats(found.packed);
    const last = Math.max(1, y.length - 1);
    return { x: y.map((_, i) => 1 + Math.round((i * (found.length - 1)) / last)), y };
  }

  const figure = (kind) => structuredClone(data.figures[kind]);
  const format = (v) => (v === null || v === undefined ? "" : typeof v === "number" ? String(+v.toPrecision(5)) : String(v));
  const column = (i) => [["e", rows.expert[i]], ["", rows.head[i] ?? rows.kv_head[i]]].find(([, v]) => v !== null && v !== undefined);

  function options(select, values, chosen, text = (v) => v) {
    select.replaceChildren(...values.map((value) => new Option(text(value), value, false, value === chosen)));
  }

  const own = (model) => ofModel.get(model);
  const at = (metric, i) => (rows[metric] === undefined || i === undefined ? null : rows[metric][i]);

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
    const down = new Map(layers.map((layer, k) => [layer, k])), right = new Map(columns.map((column, k) => [column, k]));
    for (const i of members) {
      const y = down.get(rows.layer[i]), x = right.get(across(i));
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

  function drawDetail() {
    const fig = figure("spectrum"), compared = data.kind !== "scan" && baseOf.get(state.model) !== state.model;
    const sources = [[baseOf.get(state.model), "sigma"], [state.model, "sigma"], [state.model, "delta_sigma"]];
    fig.data = fig.data.slice(0, compared ? 3 : 1).map((trace, k) => ({ ...trace, ...unpack(sources[k][0], state.name, sources[k][1]) }));
    if (!compared) fig.data[0].name = "sigma";
    else if (data.kind === "trajectory") [baseOf.get(state.model), state.model].forEach((name, k) => { fig.data[k].name = safe(name); });
    fig.layout.title.text = "Singular values";
    const i = places.get(key(state.model, state.name));
    const parts = densities.get(key(state.model, state.name)), scan = i === undefined ? [] : scanPoints(i);
    if (parts) fig.layout.height = data.figures.density.layout.height;
    Plotly.react(by("spectrum"), fig.data, fig.layout, config);
    describe(i);
    by("density-box").hidden = !parts;
    if (parts) drawDensity(parts, i);
    by("ks-box").hidden = !scan.length;
    if (scan.length) drawScan(scan, i);
    by("agreement-box").hidden = by("agreement").hidden = !compared;
    if (compared) drawAgreement(i);
  }

  function describe(i) {
    const facts = i === undefined ? [] : [`${rows.rows[i]} x ${rows.cols[i]}`, rows.status[i] || "ok", rows.method[i] ? `method ${rows.method[i]}` : ""];
    for (const metric of ["delta_relative", "value_share", "stable_rank", "left_agreement_mean", "intruders", "pl_alpha", "mp_spikes", "peak_count"])
      if (at(metric, i) !== null) facts.push(`${metric} ${format(at(metric, i))}`);
    by("matrix-text").textContent = facts.filter(Boolean).join(" · ");
    const warning = i === undefined ? "" : rows.warning[i];
    by("matrix-warning").hidden = !warning;
    by("matrix-warning").textContent = warning ? `Power law: ${warning}.` : "";
  }

  // Densities: shares in bins and points of the laws come from Python; here they are only scaled and drawn.
  function steps([low, high, packed], floor, perLambda) {
    const shares = floats(packed), width = Math.log(high / low) / shares.length;
    const edges = Array.from({ length: shares.length + 1 }, (_, k) => low * Math.exp(k * width));
    const wide = edges.slice(1).map((edge, k) => (perLambda ? edge - edges[k] : width));
    const bottom = floor ?? 0.5 / Math.max(...wide);
    const tops = shares.map((share, k) => Math.max(share / wide[k], bottom));
    return { x: edges.flatMap((e) => [e, e]), y: [bottom, ...tops.flatMap((t) => [t, t]), bottom], bottom };
  }

  function drawDensity(parts, i) {
    const fig = figure("density"), axes = by("density-axes").value, logY = axes === "log-log";
    const longest = parts.bars ? logFloor(parts) : 1e-3, floor = logY ? longest : 0;
    const tops = [], drawn = {};
    for (const which of ["bars", "null"]) if (parts[which]) drawn[which] = steps(parts[which], floor, logY);
    for (const [law, packed] of Object.entries(parts.laws)) {
      const points = floats(packed), x = points.slice(0, points.length / 2), rho = points.slice(points.length / 2);
      drawn[law] = { x, y: logY ? rho : rho.map((r, k) => r * x[k]) };
    }
    for (const { y } of Object.values(drawn)) for (const v of y) if (Number.isFinite(v)) tops.push(v);
    const spikes = at("mp_spikes", i) ?? 0, sigma = unpack(state.model, state.name, "sigma");
    const found = sigma.y.filter((_, k) => sigma.x[k] <= spikes).map((s) => lambda(s, i));
    if (found.length) drawn.spikes = { x: found, y: found.map(() => floor) };
    fig.data = fig.data.filter((trace) => drawn[trace.meta]).map((trace) => ({ ...trace, ...drawn[trace.meta], name: lawName(trace, parts, i) }));
    const top = tops.reduce((a, b) => Math.max(a, b), logY ? floor * 10 : 0);
    Object.assign(fig.layout.yaxis, logY ? { range: [Math.log10(floor) - BELOW, Math.log10(top) + 0.2] } : { type: "linear", dtick: undefined, range: [0, 1.08 * top] });
    [fig.layout.xaxis.title.text, fig.layout.yaxis.title.text] = data.figures.density_titles[axes];
    fig.layout.title.text = "Density of the eigenvalues";
    markXmin(fig, i);
    Plotly.react(by("density"), fig.data, fig.layout, config);
  }

  // Marks that stand on the floor count as outside of an axis that begins there.
  const BELOW = 0.01;
  // Bars stand below the lowest one that a single eigenvalue can make.
  const logFloor = (parts) => steps(parts.bars, null, true).bottom / parts.total;
  const lambda = (sigma, i) => (sigma * sigma) / Math.max(rows.rows[i], rows.cols[i]);

  function lawName(trace, parts, i) {
    const alpha = at(`${trace.meta}_alpha`, i), plain = trace.name.split(" (")[0];
    if (trace.meta === "bars" && parts.zeros) return `${plain} (without ${parts.zeros} zeros)`;
    if (trace.meta === "spikes") return `${plain} (${at("mp_spikes", i)})`;
    return alpha === null ? plain : `${plain} (α ${alpha.toFixed(2)})`;
  }

  function markXmin(fig, i, text) {
    const xmin = at("pl_xmin", i);
    if (!(xmin > 0)) { fig.layout.shapes = []; fig.layout.annotations = []; return; }
    Object.assign(fig.layout.shapes[0], { x0: xmin, x1: xmin });
    if (text) fig.layout.annotations[0].text = text;
    else fig.layout.annotations[0].x = Math.log10(xmin);
  }

  function scanPoints(i) {
    const sigma = unpack(state.model, state.name, "sigma"), scan = unpack(state.model, state.name, "pl_ks_scan");
    return scan.y.map((d, k) => [lambda(sigma.y[k], i), d]).filter(([x, d]) => x > 0 && Number.isFinite(d)).sort((a, b) => a[0] - b[0]);
  }

  function drawScan(points, i) {
    const fig = figure("ks");
    Object.assign(fig.data[0], { x: points.map((p) => p[0]), y: points.map((p) => p[1]) });
    const xmin = at("pl_xmin", i), distance = at("pl_ks", i), alpha = at("pl_alpha", i), tail = at("pl_tail_count", i);
    if (xmin === null || distance === null) fig.data.length = 1;
    else Object.assign(fig.data[1], { x: [xmin], y: [distance] });
    const words = distance === null ? [] : [`x<sub>min</sub> = ${format(xmin === null ? null : +xmin.toPrecision(3))}`, `KS ${distance.toFixed(3)}`];
    if (alpha !== null) words.push(`α ${alpha.toFixed(2)}`);
    if (tail !== null) words.push(`${tail} eigenvalues in the tail`);
    markXmin(fig, i, words.join(", "));
    fig.layout.title.text = "Where the power law begins";
    Plotly.react(by("ks"), fig.data, fig.layout, config);
  }

  function drawAgreement(i) {
    const windowed = curves.has(key(state.model, state.name, "left_agreement_window"));
    by("agreement-label").hidden = !windowed;
    const kind = windowed ? by("agreement-kind").value : "agreement";
    const agree = figure("agreement");
    let last = 0;
    for (const [k, side] of ["left", "right"].entries()) {
      Object.assign(agree.data[k], unpack(state.model, state.name, `${side}_${kind}`));
      const level = at(`${side}_${kind}_chance`, i);
      last = agree.data[k].x.at(-1) ?? last;
      Object.assign(agree.data[k + 2], level === null || !last ? { x: [], y: [] } : { x: [1, last], y: [level, level] });
    }
    if (kind !== "agreement") agree.layout.yaxis.title.text = "norm of the projection on base vectors";
    agree.layout.shapes = (peaks.get(key(baseOf.get(state.model), state.name)) ?? []).map(([peak, from, to]) => {
      const shape = structuredClone(data.figures.peak);
      Object.assign(shape, { x0: from - 0.5, x1: to + 0.5 });
      // A narrow band has no room for its name.
      if (to - from + 1 > 0.08 * last) shape.label.text = `peak ${peak + 1}`;
      else delete shape.label;
      return shape;
    });
    agree.layout.title.text = agree.layout.shapes.length ? "Agreement of singular vectors (shaded: peaks of the base's spectrum)" : "Agreement of singular vectors";
    Plotly.react(by("agreement"), agree.data, agree.layout, config);
  }

  // Training: median and quartiles of the chosen metric, a panel for each part.
  function drawBands() {
    if (!data.evolution) return;
    const found = data.evolution.bands[state.metric];
    by("evolution-metric").textContent = state.metric;
    by("bands").replaceChildren();
    for (const part of data.evolution.parts.filter((p) => found[p])) {
      const fig = figure("band"), { times, low, middle, high } = found[part], place = document.createElement("div");
      Object.assign(fig.data[0], { x: times, y: middle });
      Object.assign(fig.data[1], { x: [...times, ...times.toReversed()], y: [...low, ...high.toReversed()] });
      fig.layout.title.text = safe(part);
      fig.layout.xaxis.title.text = data.evolution.over === "order" ? "checkpoint" : data.evolution.over;
      fig.layout.showlegend = false;
      fig.layout.shapes = data.evolution.breaks.map(({ x, line }) => ({ type: "line", yref: "paper", y0: 0, y1: 1, x0: x, x1: x, line }));
      place.dataset.part = part;
      by("bands").append(place);
      Plotly.newPlot(place, fig.data, fig.layout, config);
    }
  }

  // Heads and domains
  function drawDomains() {
    const { figures, names, score, scaled } = data.domains;
    for (const [id, name] of [["head-maps", "maps"], ["lorenz", "lorenz"], ["spearman", "spearman"], ["cosine", "cosine"]])
      if (figures[name] && by(id)) Plotly.newPlot(by(id), figures[name].data, figures[name].layout, config);
    if (!by("score")) return;
    const index = names.map((_, k) => k);
    options(by("domain"), index, 1, (k) => names[k]);
    options(by("reference"), index, 0, (k) => names[k]);
    const draw = () => {
      const [a, b] = ["domain", "reference"].map((id) => scaled[Number(by(id).value)]);
      const fig = structuredClone(score);
      fig.data[0].z = a.map((line, y) => line.map((v, x) => (v === null || b[y][x] === null ? null : v - b[y][x])));
      Plotly.react(by("score"), fig.data, fig.layout, config);
    };
    for (const id of ["domain", "reference"]) by(id).addEventListener("change", draw);
    draw();
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
    else made.title = made.textContent;
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

  const collator = new Intl.Collator(undefined, { numeric: true });
  function compare(a, b, up) {
    if (a === null || a === undefined || a === "") return 1;
    if (b === null || b === undefined || b === "") return -1;
    const order = typeof a === "number" && typeof b === "number" ? a - b : collator.compare(String(a), String(b));
    return up ? order : -order;
  }

  const LABELS = ["name", "layer", "part", "head", "kv_head", "rows", "cols", "status"];
  const shown = () => [
    ...LABELS,
    ...(own(state.model).some((i) => rows.warning[i]) ? ["warning"] : []),
    ...data.metrics.filter((m) => own(state.model).some((i) => rows[m][i] !== null)),
  ];
  const SHOWN_ROWS = 200;

  function members() {
    const wanted = state.filter.toLowerCase();
    const found = own(state.model).filter((i) => !wanted || `${rows.name[i]} ${rows.part[i]} ${rows.status[i]}`.toLowerCase().includes(wanted));
    return found.sort((a, b) => compare(rows[state.sort][a], rows[state.sort][b], state.up));
  }

  function drawTable() {
    const table = by("metrics-table"), columns = shown(), found = members();
    const numeric = (name) => !["name", "part", "status", "warning"].includes(name);
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

  // Where there are densities, of the layers' matrices the first with most singular values; otherwise the first head.
  function usual(indices) {
    const shorter = (i) => Math.min(rows.rows[i], rows.cols[i]), inside = indices.filter((i) => rows.layer[i] !== null);
    if (data.densities.length && inside.length) return inside.reduce((a, b) => (shorter(b) > shorter(a) ? b : a));
    return indices.find((i) => column(i)) ?? indices[0];
  }

  function chooseModel(model) {
    state.model = model;
    const indices = own(model), parts = [...new Set(indices.map((i) => rows.part[i]))];
    options(by("matrix"), indices.map((i) => rows.name[i]), state.name);
    options(by("part"), ["", ...parts], state.part, (p) => p || "all");
    if (!parts.includes(state.part)) state.part = "";
    const names = new Set(indices.map((i) => rows.name[i]));
    if (!names.has(state.name)) state.name = indices.length ? rows.name[usual(indices)] : null;
    if (state.name !== null) by("matrix").value = state.name;
    drawPanels(); drawDetail(); drawLayers(); drawTable();
  }

  const pickable = data.models.map((m) => m.model);
  const first = data.models.find((m) => m.role === "tuned") ?? data.models.at(data.kind === "trajectory" ? -1 : 0);
  options(by("metric"), data.metrics, state.metric);
  options(by("model"), pickable, first.model);
  by("model-label").hidden = pickable.length < 2;
  options(by("outcome"), ["", "!", ...new Set(data.tensors.map((t) => t.outcome))], "!", (o) => (o === "" ? "all" : o === "!" ? "not analysed as usual" : o));
  by("metric").addEventListener("change", (e) => { state.metric = e.target.value; drawPanels(); drawBands(); drawLayers(); });
  by("model").addEventListener("change", (e) => chooseModel(e.target.value));
  by("matrix").addEventListener("change", (e) => choose(e.target.value));
  by("part").addEventListener("change", (e) => { state.part = e.target.value; drawLayers(); });
  by("density-axes").addEventListener("change", drawDetail);
  by("agreement-kind").addEventListener("change", drawDetail);
  by("shared").addEventListener("change", drawPanels);
  by("filter").addEventListener("input", (e) => { state.filter = e.target.value; drawTable(); });
  by("outcome").addEventListener("change", drawTensors);
  by("csv").addEventListener("click", () => download("metrics.csv", ["model", ...shown()], members().map((i) => [state.model, ...shown().map((c) => rows[c][i])])));
  by("tensors-csv").addEventListener("click", () => download("tensors.csv", TENSORS, chosenTensors().map((t) => TENSORS.map((c) => t[c]))));
  if (data.kinship) Plotly.newPlot(by("kinship-figure"), data.kinship.data, data.kinship.layout, config);
  if (data.domains) drawDomains();
  if (data.metrics.length) { chooseModel(first.model); drawBands(); }
  drawTensors();
})();
