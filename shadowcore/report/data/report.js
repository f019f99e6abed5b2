// Values under the pointer, or by the arrow keys. Everything else in the page stands without this.
"use strict";
(() => {
  const study = JSON.parse(document.getElementById("study").textContent);
  const number = (value) =>
    value === null || value === undefined ? "none" : value.toLocaleString("en-US", { maximumFractionDigits: 4 });
  const at = (path) => path.reduce((value, key) => (value === undefined ? value : value[key]), study);

  // The column whose end is the first beyond x.
  const column = (ends, x) => {
    let low = 0, high = ends.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (ends[middle] > x) high = middle; else low = middle + 1;
    }
    return low;
  };

  for (const plot of document.querySelectorAll(".plot[data-values]")) {
    const what = JSON.parse(plot.dataset.values);
    const [left, right, top, bottom] = JSON.parse(plot.dataset.axes);
    const ends = at(what.operation);
    if (!ends || !ends.length) continue;
    const last = ends[ends.length - 1];
    const mark = plot.appendChild(document.createElement("div"));
    const tip = plot.appendChild(document.createElement("div"));
    mark.className = "mark";
    tip.className = "tip";
    tip.setAttribute("role", "status");
    mark.hidden = tip.hidden = true;
    plot.tabIndex = 0;
    let chosen = 0, row = 0;

    const show = () => {
      const from = chosen ? ends[chosen - 1] : 0;
      const lines = [`${study.unit} ${number(from)} to ${number(ends[chosen])}`];
      if (what.rows) {
        const name = what.rows[row];
        lines.push(`${name}: ${number(at(what.counts)[row][chosen])} ${what.unit}`);
      } else {
        for (const [label, path] of what.series) {
          const own = at(path.slice(0, -2).concat("windows", "operation"));
          const value = at(path)[own === ends ? chosen : column(own, (from + ends[chosen]) / 2)];
          const length = ends[chosen] - from;
          const rate = what.per ? `${number((what.per * value) / length)} for ${number(what.per)}, ` : "";
          lines.push(rate ? `${label}: ${rate}${number(value)} in all` : `${label}: ${number(value)}`);
        }
      }
      tip.textContent = lines.join("\n");
      const x = left + ((from + ends[chosen]) / 2 / last) * (right - left);
      mark.style.left = `${100 * x}%`;
      mark.style.top = `${100 * top}%`;
      mark.style.height = `${100 * (bottom - top)}%`;
      tip.style.left = tip.style.right = "";
      if (x < 0.5) tip.style.left = `${100 * x + 2}%`; else tip.style.right = `${100 * (1 - x) + 2}%`;
      const y = what.rows ? top + ((row + 0.5) / what.rows.length) * (bottom - top) : top;
      tip.style.top = `${100 * y}%`;
      mark.hidden = tip.hidden = false;
    };
    const hide = () => { mark.hidden = tip.hidden = true; };

    const point = (event) => {
      plot.classList.toggle("touched", event.pointerType === "touch");
      const box = plot.querySelector("svg").getBoundingClientRect();
      const x = ((event.clientX - box.left) / box.width - left) / (right - left);
      const y = ((event.clientY - box.top) / box.height - top) / (bottom - top);
      if (x < 0 || x > 1 || y < 0 || y > 1) { hide(); return; }
      chosen = column(ends, x * last);
      if (what.rows) row = Math.min(what.rows.length - 1, Math.floor(y * what.rows.length));
      show();
    };
    plot.addEventListener("pointermove", point);
    plot.addEventListener("pointerdown", point); // a finger comes without moving before
    plot.addEventListener("pointerleave", (event) => { if (event.pointerType !== "touch") hide(); });
    plot.addEventListener("focus", () => { if (plot.matches(":focus-visible")) show(); });
    plot.addEventListener("blur", hide);
    plot.addEventListener("keydown", (event) => {
      const by = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
      if (event.key === "Escape") hide();
      if (!by || (by[1] && !what.rows)) return;
      event.preventDefault();
      chosen = Math.max(0, Math.min(ends.length - 1, chosen + by[0]));
      if (what.rows) row = Math.max(0, Math.min(what.rows.length - 1, row + by[1]));
      show();
    });
  }
  for (const element of document.querySelectorAll(".script")) element.hidden = false;
  document.documentElement.dataset.ready = "yes";
})();
