// Moves through the states of a run: forwards, back, to the next exit. The steps stand in the page as text without this.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("steps").textContent);
  const stage = document.getElementById("stage");
  let run, at = 0, state, exercise = data.exercise, shown = true, score = [0, 0];
  const open = new Set();

  const make = (name, attributes = {}, ...children) => {
    const element = document.createElement(name);
    for (const [key, value] of Object.entries(attributes))
      if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
      else if (value !== undefined && value !== false) element.setAttribute(key, value === true ? "" : value);
    element.append(...children);
    return element;
  };
  const button = (text, label, press) => make("button", { type: "button", "aria-label": label, title: label, onclick: press }, text);

  // -- controls
  const designs = make("span", { role: "group", "aria-label": "design" });
  const slider = make("input", { type: "range", min: 0, "aria-label": "step", oninput: () => go(+slider.value) });
  const count = make("span", { class: "count", role: "status" });
  const first = button("|\u25c0", "to the start (Home)", () => go(0));
  const back = button("\u25c0", "one step back (left arrow)", () => go(at - 1));
  const next = button("\u25b6", "one step on (right arrow)", () => forward());
  const nextExit = button("next exit \u25b6\u25b6", "to the next VM exit (n)", () => go(exitAfter(at)));
  const lastExit = button("\u25c0\u25c0 exit", "to the VM exit before (p)", () => go(exitBefore(at)));
  const ask = make("input", { type: "checkbox", onchange: () => { exercise = ask.checked; score = [0, 0]; go(at); } });
  const asked = make("label", {}, ask, " exercise: hide the answers ");
  const points = make("span", { class: "count" });
  const event = make("section", { class: "event", "aria-live": "polite" });
  const panels = make("div", { class: "panels" });
  const lists = {};
  for (const [name, title] of [["guest", "Guest tables"], ["shadow", "Shadow tables"], ["rest", "Reverse map, TLB, registers"]]) {
    lists[name] = make("div", { id: name });
    panels.append(make("section", { class: "panel" }, make("h2", {}, title), lists[name]));
  }
  const bar = make("div", { class: "bar" }, designs, first, lastExit, back, next, nextExit, slider, count, asked, points);
  stage.append(bar, event, panels);
  stage.hidden = false;

  // -- where we are
  const move = (target) => {
    const apply = (changes, side) => {
      for (const change of changes) {
        const value = change[side];
        if (value === null) state.delete(change[0]); else state.set(change[0], value);
      }
    };
    while (at < target) apply(run.steps[at++].changes, 2);
    while (at > target) apply(run.steps[--at].changes, 1);
  };
  const exitAfter = (from) => {
    for (let i = from; i < run.steps.length; i++) if (run.steps[i].exits.length) return i + 1;
    return run.steps.length;
  };
  const exitBefore = (from) => {
    for (let i = from - 2; i >= 0; i--) if (run.steps[i].exits.length) return i + 1;
    return 0;
  };
  const forward = () => { if (exercise && !shown && at) answer(null); else go(at + 1); };
  const go = (target, keep = false) => {
    target = Math.max(0, Math.min(run.steps.length, target));
    const moved = target !== at;
    move(target);
    if (!keep) shown = !exercise || !at || !moved && shown;
    draw();
  };
  const choose = (design) => {
    run = data.runs.find((other) => other.design === design) || data.runs[0];
    const target = Math.min(at, run.steps.length);
    state = new Map(Object.entries(run.start));
    at = 0;
    slider.max = run.steps.length;
    met = new Set();
    for (const step of run.steps) { for (const [key] of step.changes) met.add(key); for (const key of step.read) met.add(key); }
    go(target);
  };
  let met = new Set();

  // -- the event
  const kinds = () => {
    const found = new Set(["none"]);
    for (const step of run.steps) found.add(step.exits.join(", ") || "none");
    return [...found];
  };
  const answer = (choice) => {
    const right = run.steps[at - 1].exits.join(", ") || "none";
    if (choice !== null) { score[1]++; if (choice === right) score[0]++; }
    shown = true;
    draw(choice);
  };
  const drawEvent = (choice) => {
    event.className = "event";
    event.replaceChildren();
    if (!at) {
      event.append(make("h3", {}, "Before the first step"),
        make("p", { class: "note" }, `${run.design}, ${run.mode === "64" ? "4-level" : run.mode} paging. ` +
          "Arrow keys step; n and p go to the next exit and the one before."));
      return;
    }
    const step = run.steps[at - 1];
    event.append(make("h3", {}, step.title));
    if (step.note) event.append(make("p", { class: "note" }, step.note));
    if (!shown) {
      event.classList.add("hidden");
      event.append(make("p", {}, `What does it take under ${run.design}?`), make("div", { class: "choices" },
        ...kinds().map((kind) => button(kind === "none" ? "no exit" : `exit: ${kind}`, `answer: ${kind}`, () => answer(kind))),
        button("show", "show the answer", () => answer(null))));
      return;
    }
    if (step.exits.length) event.classList.add("exit");
    if (choice !== undefined && choice !== null) {
      const right = step.exits.join(", ") || "none";
      event.append(make("p", {}, make("b", {}, choice === right ? "Right." : `No: ${right === "none" ? "no exit" : right}.`)));
    }
    event.append(make("ul", {}, ...step.happened.map((sentence, i) => make("li", { class: i ? undefined : "first" }, sentence))));
  };

  // -- the panels
  const table = (key, caption, note, rows, change) => {
    const unfolded = open.has(key);
    const kept = rows.filter((row) => unfolded || met.has(row.key) || rows.length <= 6 || "vc".includes(key));
    const toggle = () => { if (unfolded) open.delete(key); else open.add(key); draw(); };
    const body = make("tbody");
    for (const row of kept) {
      const classes = [row.changed ? "changed" : "", row.gone ? "gone" : "", row.read ? "read" : ""].join(" ").trim();
      const title = row.changed ? `before: ${row.before ?? "nothing"}` : undefined;
      body.append(make("tr", { class: classes || undefined, title, "data-key": row.key, "data-value": row.value },
        make("th", { scope: "row" }, row.name), ...row.cells.map((cell, i) => make("td", { class: i ? undefined : "hex" }, cell))));
    }
    const hidden = rows.length - kept.length;
    if (hidden) body.append(make("tr", { class: "folded" }, make("td", { colspan: 4 }, `${hidden} more that no step meets`)));
    return make("table", {}, make("caption", { class: change ? "changed" : undefined },
      button(caption, unfolded ? "fold" : "show all entries", toggle), " ", make("small", {}, note)), body);
  };

  const draw = (choice) => {
    const step = at ? run.steps[at - 1] : null;
    const hide = exercise && !shown && step;
    if (hide) move(at - 1); // The state before the answer.
    const changed = new Map();
    if (step && !hide) for (const [key, before, after] of step.changes) changed.set(key, [before, after]);
    const read = new Set(step && !hide ? step.read : []);
    const groups = { g: new Map(), s: new Map() };
    const rest = { r: [], t: [], v: [], c: [] };
    const entries = [...state];
    for (const [key, [before, after]] of changed) if (after === null) entries.push([key, before, true]);
    for (const [key, value, gone] of entries) {
      const [kind, table, index] = key.split(":");
      const row = { key, value, gone, changed: changed.has(key), before: changed.get(key)?.[0], read: read.has(key) };
      if (kind === "g" || kind === "s") {
        if (!groups[kind].has(table)) groups[kind].set(table, { rows: [] });
        const group = groups[kind].get(table);
        if (index === undefined) Object.assign(group, { head: value, change: row.changed, gone });
        else { row.name = index; row.cells = value.split("|"); group.rows.push(row); }
      } else rest[kind].push(Object.assign(row, { name: key.slice(2), cells: value.split("|") }));
    }
    const order = (group) => group.rows.sort((a, b) => a.name - b.name);
    const draws = { g: [], s: [] };
    for (const [gfn, group] of groups.g)
      draws.g.push([-+(group.head ?? 0), parseInt(gfn, 16), table(`g:${gfn}`, `table at gfn 0x${gfn}`, `level ${group.head ?? "?"}`, order(group), group.change)]);
    for (const [page, group] of groups.s) {
      const [level, gfn, role] = (group.head ?? "?||").split("|");
      draws.s.push([-+level || 0, +page, table(`s:${page}`, `shadow page ${page}${group.gone ? ", zapped" : ""}`, role ?? "", order(group), group.change)]);
    }
    for (const kind of "gs") draws[kind].sort((a, b) => a[0] - b[0] || a[1] - b[1]);
    lists.guest.replaceChildren(...draws.g.map((d) => d[2]));
    lists.shadow.replaceChildren(...(draws.s.length ? draws.s.map((d) => d[2]) : [make("p", {}, "none: the processor walks the guest's tables")]));
    const names = { r: ["reverse map", "gfn: page.entry, newest first"], t: ["TLB", "vcpu: linear address"], v: ["registers", ""], c: ["VM exits so far", ""] };
    lists.rest.replaceChildren(...Object.entries(rest).filter(([, rows]) => rows.length).map(([kind, rows]) => {
      rows.sort((a, b) => a.name.length - b.name.length || (a.name < b.name ? -1 : 1));
      for (const row of rows) {
        const [vcpu, what] = row.name.split(":");
        if (kind === "r") row.name = `0x${row.name}`;
        if (kind === "t") row.name = `${vcpu}: 0x${what}`;
        if (kind === "v") row.name = `${what.toUpperCase()} of vcpu ${vcpu}`;
      }
      return table(kind, names[kind][0], names[kind][1], rows, false);
    }));
    if (hide) move(at + 1);
    drawEvent(choice);
    designs.replaceChildren(...data.runs.map((other) => {
      const chosen = button(other.design, `show ${other.design}`, () => choose(other.design));
      chosen.setAttribute("aria-pressed", other === run);
      return chosen;
    }));
    slider.value = at;
    count.textContent = `step ${at} of ${run.steps.length}`;
    first.disabled = back.disabled = !at;
    next.disabled = at === run.steps.length && shown;
    nextExit.disabled = at === run.steps.length;
    lastExit.disabled = !at;
    ask.checked = exercise;
    document.body.classList.toggle("exercise", exercise);
    points.textContent = exercise ? `${score[0]} right of ${score[1]}` : "";
    history.replaceState(null, "", `#${run.design}/${at}`);
  };

  document.addEventListener("keydown", (key) => {
    if (key.target.tagName === "INPUT" && key.target.type === "range" || key.ctrlKey || key.altKey || key.metaKey) return;
    const does = { ArrowRight: forward, ArrowLeft: () => go(at - 1), n: () => go(exitAfter(at)), p: () => go(exitBefore(at)),
      Home: () => go(0), End: () => go(run.steps.length) }[key.key];
    if (does) { key.preventDefault(); does(); }
  });
  const [design, step] = decodeURIComponent(location.hash.slice(1)).split("/");
  choose(design);
  go(+step || 0);
})();
