"use strict";
// The report's page. Names come from data, so they are only ever set as text.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const PER_VIEW = 60;
  const SHOWN_TARGETS = 40;
  const REFERENCES = 24;
  const VERDICTS = ["accepted", "rejected", "surplus", "failed"];

  const element = (tag, properties = {}, ...children) => {
    const made = Object.assign(document.createElement(tag), properties);
    made.append(...children);
    return made;
  };
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  const unique = (values) => [...new Set(values)].sort();

  // --- charts ---------------------------------------------------------------------------------------------

  const charts = new Map(); // id of the place → what draws it there
  function chart(id, label, make) {
    charts.set(id, { label, make });
    draw(id);
  }
  function draw(id) {
    const { label, make } = charts.get(id);
    const canvas = element("canvas", { ariaLabel: label, role: "img" });
    charts.get(id).drawn?.destroy();
    $(id).replaceChildren(canvas);
    Chart.defaults.color = colour("faint");
    Chart.defaults.borderColor = colour("line");
    Chart.defaults.animation = false;
    Chart.defaults.maintainAspectRatio = false;
    charts.get(id).drawn = new Chart(canvas, make());
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => [...charts.keys()].forEach(draw));
  const titled = (text) => ({ title: { display: true, text } });

  function targetsChart() {
    const share = (t) => t.accepted / (t.candidates || 1);
    const rows = [...data.targets].sort((a, b) => share(a) - share(b)).slice(0, SHOWN_TARGETS);
    const recipes = unique(data.targets.map((t) => t.recipe)).length > 1;
    $("targets-chart").style.height = `${90 + 26 * rows.length}px`;
    const rejected = (t) => Object.values(t.rejected).reduce((a, b) => a + b, 0);
    const counts = { accepted: (t) => t.accepted, rejected, surplus: (t) => t.surplus, failed: (t) => t.failed };
    chart("targets-chart", "Verdicts of every target, those with the fewest accepted first", () => ({
      type: "bar",
      data: {
        labels: rows.map((t) => (recipes ? `${t.target} / ${t.recipe}` : t.target)),
        datasets: VERDICTS.map((name) => ({
          label: name, data: rows.map(counts[name]), backgroundColor: colour(name), maxBarThickness: 22,
        })),
      },
      options: { indexAxis: "y", scales: { x: { stacked: true, ...titled("candidates") }, y: { stacked: true } } },
    }));
  }

  function scoresChart() {
    const name = $("score-shown").value;
    const found = data.scores[name];
    const thresholds = found.thresholds.length ? `Threshold: ${found.thresholds.join(", ")}.` : "Rejects nothing.";
    $("score-note").textContent = `${name}, over all candidates of the build that have it. ${thresholds}`;
    const bars = (counts) => found.centres.map((x, n) => ({ x, y: counts[n] }));
    const highest = Math.max(1, ...found.accepted.map((n, i) => n + found.others[i]));
    chart("scores-chart", `Histogram of ${name}`, () => ({
      type: "bar",
      data: {
        datasets: [
          ...found.thresholds.map((t) => ({
            type: "line", label: `threshold ${t}`, data: [{ x: t, y: 0 }, { x: t, y: highest }], stack: `${t}`,
            borderColor: colour("ink"), backgroundColor: colour("ink"), borderDash: [5, 4], pointRadius: 0,
          })),
          { label: "accepted", data: bars(found.accepted), backgroundColor: colour("accepted"), stack: "bars" },
          { label: "not accepted", data: bars(found.others), backgroundColor: colour("rejected"), stack: "bars" },
        ].map((set) => ({ ...set, categoryPercentage: 1, barPercentage: 0.95, grouped: false })),
      },
      options: {
        scales: {
          x: { type: "linear", stacked: true, offset: false, ...titled(name) },
          y: { stacked: true, ...titled("candidates") },
        },
      },
    }));
  }

  function seedsChart() {
    const points = (refused) => data.seeds.filter((s) => Boolean(s.refused) === refused).map((s) => ({
      x: s.norm, y: s.autocorrelation, name: `${s.class} ${s.origin}${s.refused ? `: ${s.refused}` : ""}`,
    }));
    chart("seeds-chart", "Norm and autocorrelation of the seeds", () => ({
      type: "scatter",
      data: {
        datasets: [
          { label: "combined", data: points(false), backgroundColor: colour("accepted") },
          { label: "left out", data: points(true), backgroundColor: colour("rejected") },
        ],
      },
      options: {
        scales: { x: titled("norm / √d"), y: titled("autocorrelation of neighbours") },
        plugins: { tooltip: { callbacks: { label: (item) => item.raw.name } } },
      },
    }));
  }

  function timeChart() {
    const names = Object.keys(data.seconds);
    chart("time-chart", "Seconds of every phase", () => ({
      type: "bar",
      data: { labels: names, datasets: [{ data: names.map((n) => data.seconds[n]), backgroundColor: colour("accent") }] },
      options: { indexAxis: "y", plugins: { legend: { display: false } }, scales: { x: titled("seconds") } },
    }));
  }

  function curve(place, id, label, xs, ys, xTitle, yTitle) {
    place.append(element("div", { className: "chart short", id }));
    chart(id, label, () => ({
      type: "line",
      data: { labels: xs, datasets: [{ data: ys, borderColor: colour("accent"), backgroundColor: colour("accent") }] },
      options: { plugins: { legend: { display: false } }, scales: { x: titled(xTitle), y: titled(yTitle) } },
    }));
  }

  // --- candidates -----------------------------------------------------------------------------------------

  let shown = [];
  let view = 0;
  let open = -1;

  function fill(select, all, values) {
    select.append(element("option", { value: "", textContent: all }));
    values.forEach((value) => select.append(element("option", { value, textContent: value })));
  }

  function filter() {
    const [target, recipe, verdict, score] = ["target", "recipe", "verdict", "score"].map((n) => $(`f-${n}`).value);
    const bound = (id, otherwise) => ($(id).value === "" ? otherwise : Number($(id).value));
    const [least, most] = [bound("f-least", -Infinity), bound("f-most", Infinity)];
    const [kind, rule] = verdict.split(" by ");
    shown = data.cards.filter((c) =>
      (!target || c.target === target) && (!recipe || c.recipe === recipe) &&
      (!verdict || (c.verdict === kind && (!rule || c.rule === rule))) &&
      (!score || (c.scores[score] >= least && c.scores[score] <= most)));
    ["f-least", "f-most"].forEach((id) => { $(id).disabled = !score; });
    view = 0;
    strip(target);
    grid();
  }

  function strip(target) {
    const labels = unique(data.targets.filter((t) => !target || t.target === target).map((t) => t.class));
    const pictures = [];
    for (let n = 0; n < REFERENCES && pictures.length < REFERENCES; n += 1) {
      labels.filter((label) => data.classes[label]?.[n]).forEach((label) => pictures.push(
        element("img", { src: data.references[data.classes[label][n]], alt: `reference of ${label}`, title: label })));
    }
    $("references").replaceChildren(...(pictures.length ? [element("span", { textContent: "References" }), ...pictures] : []));
  }

  function grid() {
    const tiles = shown.slice(view * PER_VIEW, (view + 1) * PER_VIEW).map((card, n) => {
      const reason = card.verdict === "rejected" || card.verdict === "failed" ? card.reason : "";
      const tile = element("button", { type: "button", className: `tile ${card.verdict}` },
        picture(card), element("b", { textContent: card.target }),
        element("span", { textContent: [card.verdict, reason].filter(Boolean).join(": ") }));
      tile.addEventListener("click", () => detail(view * PER_VIEW + n));
      return tile;
    });
    $("grid").replaceChildren(...tiles);
    const views = Math.max(1, Math.ceil(shown.length / PER_VIEW));
    $("count").textContent = `${shown.length} of ${data.cards.length} candidates on this page`;
    $("position").textContent = `${view + 1} of ${views}`;
    $("before").disabled = view === 0;
    $("after").disabled = view + 1 >= views;
  }

  function picture(card, className = "") {
    if (!card.picture) return element("div", { className: "none", textContent: "no image" });
    return element("img", { src: card.picture, className, alt: `${card.verdict} candidate of ${card.target}` });
  }

  // --- one candidate --------------------------------------------------------------------------------------

  function detail(number) {
    open = number;
    const card = shown[number];
    const facts = element("dl");
    const fact = (name, ...value) => facts.append(element("dt", { textContent: name }), element("dd", {}, ...value));
    fact("verdict", element("span", { className: `verdict ${card.verdict}`, textContent: card.verdict }),
      card.reason ? `: ${card.reason}` : "");
    fact("target", card.target);
    fact("recipe", card.recipe);
    fact("prompt", card.prompt);
    Object.entries({ ...card.scores, ...card.facts }).forEach(([name, value]) => fact(name, String(value)));
    if (card.nearest) fact("nearest reference", `${card.nearest[1]} of 64 bits of the perceptual hash differ`);
    if (card.twins.length) fact("looks the same as", card.twins.join(", "));

    const strip = element("div", { className: "strip" });
    const reference = (digest, name) => {
      if (!digest || !data.references[digest]) return;
      strip.append(element("span", { textContent: name }), element("img", { src: data.references[digest], alt: name }));
    };
    card.parents.forEach(([digest, weight]) => reference(digest, `parent × ${weight}`));
    reference(card.source, "source");
    reference(card.nearest?.[0], "nearest");

    const copy = element("button", { type: "button", textContent: "Copy" });
    const command = element("pre", { textContent: card.reproduce });
    copy.addEventListener("click", () => copied(copy, command));
    const body = $("detail-body");
    body.replaceChildren(element("div", { className: "columns" }, element("div", {}, picture(card, "large")), facts), strip);
    if (card.losses.length) {
      curve(body, "losses-chart", "SeedSelect's loss", card.losses.map((_, n) => n), card.losses, "iteration", "loss");
    }
    if (card.trace.length) {
      const axis = data.axes[card.recipe];
      const fits = axis?.length === card.trace.length;
      curve(body, "trace-chart", "What generating decided by", fits ? axis : card.trace.map((_, n) => n), card.trace,
        fits ? "noise ratio" : "step", fits ? "distance to the target's side" : "value");
    }
    body.append(element("div", { className: "command" }, command, copy));
    $("detail-title").textContent = card.key;
    $("previous").disabled = number === 0;
    $("next").disabled = number + 1 >= shown.length;
    if (!$("detail").open) $("detail").showModal();
  }

  async function copied(button, command) {
    const range = document.createRange();
    range.selectNodeContents(command);
    getSelection().removeAllRanges();
    getSelection().addRange(range); // where the clipboard is closed to pages, as from file://, Ctrl-C copies it
    try {
      await navigator.clipboard.writeText(command.textContent);
      button.textContent = "Copied";
    } catch {
      button.textContent = "Selected";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  }

  function step(by) {
    if (open + by >= 0 && open + by < shown.length) detail(open + by);
  }

  fill($("f-target"), "all", unique(data.cards.map((c) => c.target)));
  fill($("f-recipe"), "all", unique(data.cards.map((c) => c.recipe)));
  fill($("f-verdict"), "all", VERDICTS.filter((v) => data.cards.some((c) => c.verdict === v)).flatMap((v) =>
    [v, ...(v === "rejected" ? unique(data.cards.map((c) => c.rule).filter(Boolean)).map((r) => `rejected by ${r}`) : [])]));
  fill($("f-score"), "any", Object.keys(data.scores));
  $("filters").addEventListener("input", filter);
  $("filters").addEventListener("submit", (event) => event.preventDefault());
  $("filters").addEventListener("reset", () => setTimeout(filter)); // the fields are reset after this event
  $("before").addEventListener("click", () => { view -= 1; grid(); });
  $("after").addEventListener("click", () => { view += 1; grid(); });
  $("previous").addEventListener("click", () => step(-1));
  $("next").addEventListener("click", () => step(1));
  $("close").addEventListener("click", () => $("detail").close());
  $("detail").addEventListener("close", () => {
    ["losses-chart", "trace-chart"].forEach((id) => { charts.get(id)?.drawn?.destroy(); charts.delete(id); });
    $("grid").children[open - view * PER_VIEW]?.focus();
  });
  $("detail").addEventListener("keydown", (event) => {
    if (event.key === "ArrowLeft") step(-1);
    if (event.key === "ArrowRight") step(1);
  });

  targetsChart();
  if ($("scores-chart")) {
    Object.keys(data.scores).forEach((name) => $("score-shown").append(element("option", { value: name, textContent: name })));
    $("score-shown").addEventListener("input", scoresChart);
    scoresChart();
  }
  if ($("seeds-chart")) seedsChart();
  if ($("time-chart")) timeChart();
  filter();
})();
