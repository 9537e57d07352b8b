"use strict";
// Geometry of charts.py: width, height, and the room it leaves for the axes.
const [WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM, MANY] = {{ geometry|tojson }};
const HEAT = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];

function nearest(points, step) {
  return points.reduce((best, point) => Math.abs(point[0] - step) < Math.abs(best[0] - step) ? point : best);
}

function tooltip(plot) {
  const script = plot.querySelector("script");
  if (!script) return;
  const { frame, series } = JSON.parse(script.textContent);
  const svg = plot.querySelector("svg"), tip = plot.querySelector(".tip"), cursor = plot.querySelector(".cursor");
  const x = step => LEFT + (step - frame[0]) / (frame[1] - frame[0]) * (WIDTH - LEFT - RIGHT);
  const y = value => HEIGHT - BOTTOM - (value - frame[2]) / (frame[3] - frame[2]) * (HEIGHT - TOP - BOTTOM);

  function show(event) {
    const box = svg.getBoundingClientRect(), scale = WIDTH / box.width;
    const at = (event.clientX - box.left) * scale, height = (event.clientY - box.top) * scale;
    const step = frame[0] + (at - LEFT) / (WIDTH - LEFT - RIGHT) * (frame[1] - frame[0]);
    let hits = series.map(line => ({ ...line, point: nearest(line.points, step) }));
    if (series.length > MANY) {
      const distance = hit => Math.abs(y(hit.point[1]) - height);
      hits = [hits.reduce((best, hit) => distance(hit) < distance(best) ? hit : best)];
    }
    const place = x(hits[0].point[0]);
    cursor.setAttribute("x1", place);
    cursor.setAttribute("x2", place);
    cursor.setAttribute("visibility", "visible");
    tip.replaceChildren(`step ${hits[0].point[0]}`, ...hits.map(row));
    tip.hidden = false;
    const left = place / scale + 10;
    tip.style.left = `${left + tip.offsetWidth > box.width ? Math.max(0, left - tip.offsetWidth - 20) : left}px`;
    tip.style.top = "8px";
  }

  function row(hit) {
    const line = document.createElement("div"), dot = document.createElement("i");
    dot.style.background = hit.colour;
    line.append(dot, `${hit.label}: ${hit.point[1]}`);
    return line;
  }

  function hide() {
    tip.hidden = true;
    cursor.setAttribute("visibility", "hidden");
  }

  svg.addEventListener("pointermove", show);
  svg.addEventListener("pointerdown", show);
  svg.addEventListener("pointerleave", hide);
}

function heatColour(value) {
  const place = Math.min(1, Math.max(0, value)) * (HEAT.length - 1), index = Math.min(HEAT.length - 2, Math.floor(place));
  return HEAT[index].map((low, channel) => Math.round(low + (HEAT[index + 1][channel] - low) * (place - index)));
}

function heatMaps(block) {
  const { steps, values } = JSON.parse(document.getElementById("heat").textContent);
  const slider = block.querySelector("input"), output = block.querySelector("output"), button = block.querySelector("button");

  function draw() {
    const index = Number(slider.value);
    output.textContent = `step ${steps[index]}`;
    for (const figure of block.querySelectorAll("figure")) {
      const rows = values[figure.dataset.arm][index] || [];
      for (const cell of figure.querySelectorAll(".cell")) {
        const value = (rows[cell.dataset.row] || [])[cell.dataset.column];
        if (value === undefined) continue;
        cell.querySelector("rect").style.fill = `rgb(${heatColour(value)})`;
        cell.querySelector("text").style.fill = value > 0.6 ? "#111" : "#fff";
        cell.querySelector("text").textContent = value.toFixed(2).replace(/^0/, "");
      }
    }
  }

  let timer = null;
  button.addEventListener("click", () => {
    if (timer) { clearInterval(timer); timer = null; return; }
    slider.value = 0;
    draw();
    timer = setInterval(() => {
      slider.value = Number(slider.value) + 1;
      draw();
      if (slider.value === slider.max) { clearInterval(timer); timer = null; }
    }, 120);
  });
  slider.addEventListener("input", draw);
  draw();
}

document.querySelectorAll(".plot").forEach(tooltip);
document.querySelectorAll(".heat").forEach(heatMaps);
