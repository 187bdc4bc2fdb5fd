// Maps of the same points side by side: what is chosen in one is chosen in all, and listed by name.
const linkSelections = box => {
  const traces = [...box.data.keys()];
  const names = document.createElement("textarea");
  const label = document.createElement("label");
  Object.assign(names, {rows: 5, cols: 40, readOnly: true, className: "chosen"});
  label.append("0 chosen: draw around points (lasso or box); double-click to let go", document.createElement("br"), names);
  box.parentElement.after(label);
  let busy = false; // changing the figure sends the same events as drawing does
  const show = async points => {
    busy = true;
    names.value = (points || []).map(i => box.layout.meta.linked[i]).join("\n");
    label.firstChild.textContent = `${(points || []).length} chosen`;
    await Plotly.relayout(box, {selections: []});
    await Plotly.restyle(box, {selectedpoints: traces.map(() => points)}, traces);
    busy = false;
  };
  box.on("plotly_selected", event => {
    const points = [...new Set(((event && event.points) || []).map(p => p.pointNumber))].sort((a, b) => a - b);
    if (!busy && points.length) show(points);
  });
  const release = () => { if (!busy) show(null); };
  box.on("plotly_deselect", release);
  box.on("plotly_doubleclick", release);
};

// The table of contents, then plotly (packed in the page), then every figure. On paper figures take the paper's width.
(async () => {
  const heads = [...document.querySelectorAll("h2")];
  const nav = document.querySelector("nav");
  if (nav && heads.length > 3) {
    const list = document.createElement("ol");
    heads.forEach((head, k) => {
      head.id = `part${k + 1}`;
      const link = document.createElement("a");
      link.href = `#${head.id}`;
      link.textContent = head.textContent;
      list.appendChild(document.createElement("li")).append(link);
    });
    nav.append(list);
  }
  const packed = document.getElementById("plotly");
  try {
    if (packed) {
      const bytes = Uint8Array.from(atob(packed.textContent), c => c.charCodeAt(0));
      const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
      const script = document.createElement("script");
      script.textContent = await new Response(stream).text();
      document.head.append(script);
    }
    for (const s of document.querySelectorAll("script.figure")) {
      const figure = JSON.parse(s.textContent);
      const box = document.getElementById(s.dataset.of);
      await Plotly.newPlot(box, figure.data, figure.layout, figure.config);
      if (figure.layout.meta && figure.layout.meta.linked) linkSelections(box);
    }
    const all = () => [...document.querySelectorAll(".js-plotly-plot")];
    window.addEventListener("beforeprint", () => all().forEach(g => {
      g.style.minWidth = 0;
      Plotly.relayout(g, {width: 660, autosize: false});
    }));
    window.addEventListener("afterprint", () => all().forEach(g => {
      g.style.minWidth = g.dataset.min;
      Plotly.relayout(g, {width: null, autosize: true});
    }));
  } catch (error) {
    const message = "<p class=note>This figure could not be drawn; a browser of 2023 or later draws it.</p>";
    document.querySelectorAll(".plot").forEach(p => p.insertAdjacentHTML("afterbegin", message));
    throw error;
  } finally {
    document.body.dataset.drawn = "yes";
  }
})();
