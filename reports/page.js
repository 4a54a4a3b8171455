"use strict";
const tip = document.getElementById("tip");
const items = JSON.parse(document.getElementById("items").textContent);

function show(content, x, y) {
  tip.replaceChildren(...content);
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(4, Math.min(x + 14, innerWidth - box.width - 4))}px`;
  tip.style.top = `${y + 18 + box.height > innerHeight ? Math.max(4, y - box.height - 10) : y + 18}px`;
}

for (const element of document.querySelectorAll("[data-tip]")) {
  const open = (event) => {
    const box = element.getBoundingClientRect();
    show([element.dataset.tip], event.clientX || box.left, event.clientY || box.bottom - 14);
  };
  for (const name of ["pointerenter", "focus"]) element.addEventListener(name, open);
  for (const name of ["pointerleave", "blur"]) element.addEventListener(name, () => { tip.hidden = true; });
}

function number(cell) {
  const found = cell.textContent.replaceAll(",", "").match(/^\s*#?([-+]?\d+(\.\d+)?(e[-+]?\d+)?)/i);
  return found ? Number(found[1]) : NaN;
}

for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button")?.addEventListener("click", () => {
    const sign = head.ariaSort === "descending" ? 1 : -1;
    heads.forEach((other) => { other.ariaSort = "none"; });
    head.ariaSort = sign > 0 ? "ascending" : "descending";
    const rows = [...table.tBodies[0].rows].map((row) => [row, number(row.cells[column]), row.cells[column].textContent]);
    rows.sort(([, a, s], [, b, t]) => {
      if (Number.isNaN(a) !== Number.isNaN(b)) return Number.isNaN(a) ? 1 : -1;
      return sign * (Number.isNaN(a) ? s.localeCompare(t) : a - b);
    });
    table.tBodies[0].append(...rows.map(([row]) => row));
  }));
}

const panels = [...document.querySelectorAll("[data-points]")].map((figure) => {
  const svg = figure.querySelector("svg");
  const marks = [...svg.querySelectorAll('g[id*="points"] use')];
  const points = JSON.parse(figure.dataset.points).map((item, i) => ({
    item, x: Number(marks[i].getAttribute("x")), y: Number(marks[i].getAttribute("y")),
  }));
  const ring = document.createElementNS("http://www.w3.org/2000/svg", "circle");
  for (const [name, value] of Object.entries({ r: 5, fill: "none", stroke: "currentColor", "stroke-width": 1.5 })) {
    ring.setAttribute(name, value);
  }
  svg.append(ring);
  ring.style.display = "none";
  return { svg, points, ring };
});

function mark(item) {
  for (const { points, ring } of panels) {
    const point = points.find((other) => other.item === item);
    ring.style.display = point ? "" : "none";
    if (point) {
      ring.setAttribute("cx", point.x);
      ring.setAttribute("cy", point.y);
    }
  }
}

for (const { svg, points } of panels) {
  const near = (event) => {
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    let best = null, least = 64;
    for (const point of points) {
      const distance = (point.x - at.x) ** 2 + (point.y - at.y) ** 2;
      if (distance < least) [best, least] = [point.item, distance];
    }
    mark(best);
    tip.hidden = best === null;
    if (best === null) return;
    const content = [items[best].text];
    if (items[best].image !== null) {
      const image = document.createElement("span");
      image.className = "thumb";
      image.style.setProperty("--x", items[best].image[0]);
      image.style.setProperty("--y", items[best].image[1]);
      content.push(image);
    }
    show(content, event.clientX, event.clientY);
  };
  svg.addEventListener("pointermove", near);
  svg.addEventListener("pointerdown", near);
  svg.addEventListener("pointerleave", () => { tip.hidden = true; mark(null); });
}
