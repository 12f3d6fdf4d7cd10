"use strict";
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const main = document.querySelector("main"), panel = document.getElementById("shown");
  const groups = all(".groups tbody tr"), rows = all(".rows > li");
  if (!groups.length) return;
  const marked = new Map();
  for (const element of all("[data-g]"))
    for (const group of element.dataset.g.split(" ").filter(Boolean))
      marked.set(group, [...(marked.get(group) || []), element]);
  const ofGroup = new Map(groups.map(row => [row.dataset.g, row]));
  let held = [], lit = [];

  // Show some groups everywhere: `held` ones stay until they are let go, others as long as they are pointed at.
  const show = chosen => {
    for (const group of lit) for (const element of marked.get(group) || []) element.classList.remove("on");
    lit = chosen;
    main.classList.toggle("lit", chosen.length > 0);
    panel.hidden = chosen.length === 0;
    // What is only pointed at must not slide under the pointer and take it away.
    panel.classList.toggle("held", held.length > 0);
    if (!chosen.length) return;
    for (const group of chosen) for (const element of marked.get(group) || []) element.classList.add("on");
    const first = ofGroup.get(chosen[0]);
    panel.querySelector(".swatch").className = "swatch " + first.dataset.colour;
    panel.querySelector(".name").textContent = chosen.map(group => ofGroup.get(group).dataset.name).slice(0, 3).join(", ");
    panel.querySelector(".text").textContent = chosen.length === 1
      ? first.dataset.summary
      : (chosen.length > 3 ? `and ${chosen.length - 3} more ` : "") + "meet in this layer. Click or tap it to see them one by one.";
    panel.querySelector("[data-do=members]").hidden = chosen.length !== 1;
  };
  const hold = chosen => { held = chosen; show(chosen); };
  const read = element => element.dataset.g.split(" ").filter(Boolean);
  // A tap takes the first group of what was tapped, the next tap its next one, and after the last lets go.
  const tap = element => {
    const mine = read(element), next = held.length === 1 ? mine.indexOf(held[0]) + 1 : 0;
    hold(mine.slice(next, next + 1));
  };

  const find = target => target.closest && target.closest(".dim .swatch[data-g], .lane, .rows > li, .sky > g, .groups tbody tr");
  main.addEventListener("pointerover", event => {
    if (event.pointerType !== "mouse" || held.length) return;
    const element = find(event.target);
    show(element && !element.matches(".groups tr") ? read(element) : []);
  });
  main.addEventListener("pointerleave", () => { if (!held.length) show([]); });
  main.addEventListener("click", event => {
    if (event.target.closest("summary, details, thead, input")) return;
    const element = find(event.target);
    if (element) tap(element); else hold([]);
  });
  document.addEventListener("keydown", event => { if (event.key === "Escape") hold([]); });
  panel.addEventListener("click", event => {
    const action = event.target.dataset.do;
    if (action === "members") {
      const row = ofGroup.get(lit[0]);
      row.hidden = false;
      row.querySelector("details").open = true;
      row.scrollIntoView({ block: "center" });
      row.querySelector("summary").focus({ preventScroll: true });
    } else if (action === "drawing") document.querySelector(".sky").scrollIntoView({ block: "center" });
    else if (action === "close") hold([]);
  });

  // The layers are one stop for the Tab key; arrows go from one to the next.
  const buttons = rows.map(row => row.querySelector("button"));
  buttons.forEach((button, index) => {
    button.tabIndex = index ? -1 : 0;
    button.addEventListener("keydown", event => {
      const step = { ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10, Home: -index, End: buttons.length - 1 - index }[event.key];
      if (step === undefined) return;
      event.preventDefault();
      const next = buttons[Math.max(0, Math.min(buttons.length - 1, index + step))];
      button.tabIndex = -1;
      next.tabIndex = 0;
      next.focus();
    });
    button.addEventListener("focus", () => { if (!held.length && button.matches(":focus-visible")) show(read(rows[index])); });
  });
  for (const row of groups) {
    const name = row.querySelector(".who .name"), button = document.createElement("button");
    button.type = "button";
    name.replaceWith(button);
    button.append(name);
  }

  const box = document.getElementById("find"), count = document.querySelector(".find output");
  document.querySelector(".find").hidden = false;
  const texts = new Map(groups.map(row => [row, row.querySelector("th").textContent.toLowerCase()]));
  box.addEventListener("input", () => {
    const words = box.value.toLowerCase().split(/\s+/).filter(Boolean);
    let left = 0;
    for (const row of groups) {
      row.hidden = !words.every(word => texts.get(row).includes(word));
      left += !row.hidden;
    }
    count.textContent = `${left} of ${groups.length}`;
  });
  for (const head of all(".groups thead th[data-key]")) {
    const key = head.dataset.key;
    if (!key) continue;
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      for (const other of all(".groups thead th")) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", "descending");
      groups.sort((a, b) => b.dataset[key] - a.dataset[key]);
      groups[0].parentElement.append(...groups);
    });
  }
})();
