// Zoom, series that are switched, values under the pointer, saving. The page stands without this.
"use strict";
(() => {
  const SVG = "http://www.w3.org/2000/svg";
  const panels = JSON.parse(document.getElementById("panels").textContent);
  const number = (value) => value.toLocaleString("en-US", { maximumSignificantDigits: 5 });
  const hidden = new Set();
  const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

  const element = (parent, name, attributes, text) => {
    const made = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    return parent.appendChild(made);
  };

  // About `count` round numbers within a range.
  const round = (low, high, count) => {
    const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
    const step = power * [1, 2, 5, 10].find((each) => each * power >= rough);
    const found = [];
    for (let n = Math.ceil(low / step); n * step <= high; n++) found.push(n * step);
    return found;
  };

  const short = (value) => {
    for (const [size, suffix] of [[1e9, "G"], [1e6, "M"], [1e3, "k"]])
      if (Math.abs(value) >= size) return `${Number((value / size).toPrecision(5))}${suffix}`;
    return String(Number(value.toPrecision(5)));
  };

  const views = panels.map((panel) => {
    const figure = document.getElementById(panel.name);
    const plot = figure.querySelector(".plot"), svg = plot.querySelector("svg");
    const [, , width, height] = svg.getAttribute("viewBox").split(/\s+/).map(Number);
    const [left, right, top, bottom] = panel.place;
    const box = { left: left * width, right: right * width, top: top * height, bottom: bottom * height };
    const tip = plot.appendChild(document.createElement("div"));
    tip.className = "tip";
    tip.setAttribute("role", "status");
    tip.hidden = true;
    plot.tabIndex = 0;
    const still = [...svg.children].filter((child) => child.tagName === "g");
    const view = { panel, figure, plot, svg, box, tip, still, width, height, x: panel.x, y: panel.y, drawn: null, chosen: -1 };
    return view;
  });

  const scale = (view) => {
    const { panel, box } = view;
    const warp = panel.log ? Math.log2 : (value) => value;
    const [a, b] = view.x.map(warp), [c, d] = view.y;
    return {
      x: (value) => box.left + ((warp(value) - a) / (b - a)) * (box.right - box.left),
      y: (value) => box.bottom - ((value - c) / (d - c)) * (box.bottom - box.top),
      fromX: (at) => {
        const value = a + ((at - box.left) / (box.right - box.left)) * (b - a);
        return panel.log ? 2 ** value : value;
      },
      fromY: (at) => c + ((box.bottom - at) / (box.bottom - box.top)) * (d - c),
    };
  };

  // Marks of lines that are shown: [x, y] in the picture, and what they say.
  const marks = (view) => {
    const { panel } = view, found = [];
    if (panel.values) {
      const across = panel.columns.length, down = panel.rows.length, { left, right, top, bottom } = view.box;
      panel.values.forEach((row, y) => row.forEach((value, x) => {
        if (value === null) return;
        const says = `${panel.title}\n${panel.x_axis} ${panel.columns[x]}, ${panel.y_axis} ${panel.rows[y]}: ` +
          `${number(value)} ${panel.unit}`;
        found.push({ x: left + ((x + 0.5) / across) * (right - left), y: top + ((y + 0.5) / down) * (bottom - top), says });
      }));
      return found;
    }
    const to = scale(view);
    panel.series.forEach((series, place) => {
      if (hidden.has(place)) return;
      for (const [x, y, spread, low, high, count, label] of series.spots) {
        const at = x === null ? (view.box.left + view.box.right) / 2 : to.x(x);
        let says = `${series.name}${label ? `, ${label}` : ""}: ${number(y)} ${panel.unit}`;
        if (count > 1) says += `\n${number(low)} to ${number(high)} over ${count} seeds, deviation ${number(spread)}`;
        found.push({ x: at, y: to.y(y), says });
      }
    });
    return found.filter((mark) => mark.x >= view.box.left - 1 && mark.x <= view.box.right + 1 &&
      mark.y >= view.box.top - 1 && mark.y <= view.box.bottom + 1);
  };

  const zoomed = (view) => view.x !== view.panel.x || view.y !== view.panel.y;

  const draw = (view) => {
    const { panel, svg, box } = view;
    if (panel.values) return;
    view.drawn?.remove();
    view.drawn = null;
    for (const child of view.still) child.style.display = zoomed(view) ? "none" : "";
    panel.series.forEach((_, place) => {
      for (const part of svg.querySelectorAll(`[id^="${panel.name}-series-${place}-"]`))
        part.style.display = hidden.has(place) ? "none" : "";
    });
    if (!zoomed(view)) return;
    const to = scale(view), group = view.drawn = element(svg, "g", { class: "zoomed", "font-size": 9 });
    const clip = `${panel.name}-window`;
    element(element(group, "clipPath", { id: clip }), "rect",
      { x: box.left, y: box.top, width: box.right - box.left, height: box.bottom - box.top });
    for (const value of round(view.y[0], view.y[1], 5)) {
      element(group, "line", { x1: box.left, x2: box.right, y1: to.y(value), y2: to.y(value), stroke: "var(--faint)", "stroke-width": 0.5 });
      element(group, "text", { x: box.left - 5, y: to.y(value) + 3, "text-anchor": "end", fill: "var(--ink)" }, short(value));
    }
    let last = -1e9;
    for (const [value, text] of panel.ticks) {
      const at = to.x(value);
      if (at < box.left - 1 || at > box.right + 1 || at - last < 6 * text.length) continue;
      last = at;
      element(group, "line", { x1: at, x2: at, y1: box.bottom, y2: box.bottom + 3, stroke: "var(--ink)", "stroke-width": 0.6 });
      element(group, "text", { x: at, y: box.bottom + 13, "text-anchor": "middle", fill: "var(--ink)" }, text);
    }
    element(group, "text", { x: (box.left + box.right) / 2, y: view.height - 3, "text-anchor": "middle", fill: "var(--ink)" }, panel.axis);
    const side = { x: 9, y: (box.top + box.bottom) / 2, "text-anchor": "middle", fill: "var(--ink)" };
    element(group, "text", { ...side, transform: `rotate(-90 ${side.x} ${side.y})` }, panel.unit);
    element(group, "path", { d: `M${box.left} ${box.top}V${box.bottom}H${box.right}`, fill: "none", stroke: "var(--ink)", "stroke-width": 0.6 });
    const inside = element(group, "g", { "clip-path": `url(#${clip})` });
    panel.series.forEach((series, place) => {
      if (hidden.has(place)) return;
      const stroke = `var(--design-${place % 8})`, style = { fill: "none", stroke, "stroke-width": 1.4, "stroke-dasharray": series.dash };
      const there = series.spots.filter((spot) => spot[0] !== null);
      if (panel.joined && there.length > 1)
        element(inside, "path", { ...style, d: `M${there.map(([x, y]) => `${to.x(x)} ${to.y(y)}`).join("L")}` });
      for (const [x, y, spread] of series.spots) {
        if (x === null) { element(inside, "path", { ...style, d: `M${box.left} ${to.y(y)}H${box.right}` }); continue; }
        if (spread) element(inside, "path",
          { fill: "none", stroke, d: `M${to.x(x)} ${to.y(y - spread)}V${to.y(y + spread)}` });
        element(inside, "circle", { cx: to.x(x), cy: to.y(y), r: 2.4, fill: stroke, stroke: "none" });
      }
    });
  };

  const show = (view, mark) => {
    if (!mark) { view.tip.hidden = true; return; }
    view.tip.textContent = mark.says;
    const x = mark.x / view.width, y = mark.y / view.height;
    view.tip.style.left = view.tip.style.right = view.tip.style.top = view.tip.style.bottom = "";
    if (x < 0.5) view.tip.style.left = `${100 * x + 2}%`; else view.tip.style.right = `${100 * (1 - x) + 2}%`;
    if (y < 0.5) view.tip.style.top = `${100 * y + 2}%`; else view.tip.style.bottom = `${100 * (1 - y) + 2}%`;
    view.tip.hidden = false;
  };

  const reset = (view) => { view.x = view.panel.x; view.y = view.panel.y; draw(view); show(view); };

  for (const view of views) {
    const { plot, svg, panel, box } = view;
    let from = null, frame = null;
    const at = (event) => {
      const rect = svg.getBoundingClientRect();
      return [((event.clientX - rect.left) / rect.width) * view.width, ((event.clientY - rect.top) / rect.height) * view.height];
    };
    const nearest = (event) => {
      const [x, y] = at(event);
      let best = null, distance = 900;
      for (const mark of marks(view)) {
        const far = (mark.x - x) ** 2 + (mark.y - y) ** 2;
        if (far < distance) { distance = far; best = mark; }
      }
      return best;
    };
    svg.addEventListener("pointerdown", (event) => {
      show(view, nearest(event));
      if (panel.values || event.button || event.pointerType === "touch") return;
      from = at(event);
      try { svg.setPointerCapture(event.pointerId); } catch { /* an event that no pointer made */ }
    });
    svg.addEventListener("pointermove", (event) => {
      if (!from) { show(view, nearest(event)); return; }
      const to = at(event);
      frame ??= plot.appendChild(document.createElement("div"));
      frame.className = "window";
      const span = (a, b, low, high, whole) => {
        const [c, d] = [clamp(Math.min(a, b), low, high), clamp(Math.max(a, b), low, high)];
        return [`${(100 * c) / whole}%`, `${(100 * (d - c)) / whole}%`];
      };
      [frame.style.left, frame.style.width] = span(from[0], to[0], box.left, box.right, view.width);
      [frame.style.top, frame.style.height] = span(from[1], to[1], box.top, box.bottom, view.height);
    });
    svg.addEventListener("pointerup", (event) => {
      if (!from) return;
      const to = at(event), scales = scale(view);
      const xs = [from[0], to[0]].map((x) => clamp(x, box.left, box.right)).sort((a, b) => a - b);
      const ys = [from[1], to[1]].map((y) => clamp(y, box.top, box.bottom)).sort((a, b) => b - a);
      from = null;
      frame?.remove();
      frame = null;
      if (xs[1] - xs[0] < 5 || ys[0] - ys[1] < 5) return;
      view.x = xs.map(scales.fromX);
      view.y = ys.map(scales.fromY);
      draw(view);
    });
    svg.addEventListener("dblclick", () => reset(view));
    plot.addEventListener("pointerleave", () => { if (!from) show(view); });
    plot.addEventListener("blur", () => show(view));
    plot.addEventListener("keydown", (event) => {
      if (event.key === "Escape") reset(view);
      const by = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 }[event.key];
      if (!by) return;
      event.preventDefault();
      const all = marks(view);
      if (!all.length) return;
      view.chosen = (view.chosen + by + all.length) % all.length;
      show(view, all[view.chosen]);
    });
  }

  for (const button of document.querySelectorAll("button.series"))
    button.addEventListener("click", () => {
      const place = Number(button.dataset.series);
      if (hidden.has(place)) hidden.delete(place); else hidden.add(place);
      button.setAttribute("aria-pressed", String(!hidden.has(place)));
      for (const view of views) { draw(view); show(view); }
    });

  // A picture that stands alone: colours instead of variables, a ground, a font.
  const alone = (view) => {
    const copy = view.svg.cloneNode(true), style = getComputedStyle(document.documentElement);
    copy.setAttribute("xmlns", SVG);
    copy.setAttribute("width", view.width);
    copy.setAttribute("height", view.height);
    copy.setAttribute("style", `fill: ${style.getPropertyValue("--ink")}; font-family: "DejaVu Sans", Arial, sans-serif`);
    const ground = document.createElementNS(SVG, "rect");
    ground.setAttribute("width", view.width);
    ground.setAttribute("height", view.height);
    ground.setAttribute("fill", style.getPropertyValue("--paper").trim());
    copy.prepend(ground);
    const text = new XMLSerializer().serializeToString(copy);
    return text.replace(/var\((--[\w-]+)\)/g, (_, name) => style.getPropertyValue(name).trim());
  };

  const csv = (view) => {
    const { panel } = view, quote = (value) => (/[",\n]/.test(value) ? `"${String(value).replaceAll('"', '""')}"` : value);
    const lines = panel.values
      ? [[panel.x_axis, panel.y_axis, panel.unit], ...panel.values.flatMap((row, y) =>
        row.flatMap((value, x) => (value === null ? [] : [[panel.columns[x], panel.rows[y], value]])))]
      : [["design", panel.axis || "case", panel.unit, "deviation", "lowest", "highest", "seeds"], ...panel.series.flatMap(
        (series) => series.spots.map(([x, y, spread, low, high, count, label]) =>
          [series.name, panel.joined ? x ?? "" : label, y, spread, low, high, count]))];
    return lines.map((line) => line.map(quote).join(",")).join("\n") + "\n";
  };

  const save = (blob, name) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(blob);
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  };

  const png = (view) => new Promise((done) => {
    const image = new Image(), canvas = document.createElement("canvas");
    canvas.width = 3 * view.width;
    canvas.height = 3 * view.height;
    image.onload = () => {
      canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
      canvas.toBlob(done, "image/png");
    };
    image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(alone(view))}`;
  });

  for (const view of views)
    for (const button of view.figure.querySelectorAll("[data-save]"))
      button.addEventListener("click", async () => {
        const kind = button.dataset.save, name = `${view.panel.name}.${kind}`;
        if (kind === "svg") save(new Blob([alone(view)], { type: "image/svg+xml" }), name);
        else if (kind === "csv") save(new Blob([csv(view)], { type: "text/csv" }), name);
        else save(await png(view), name);
      });

  for (const each of document.querySelectorAll(".script")) each.hidden = false;
  window.sweep = { views, marks, alone, csv, png };
  document.documentElement.dataset.ready = "yes";
})();
