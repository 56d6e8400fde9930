// Shared by the report and the review page. File names are inserted as text, never as markup.
"use strict";

function make(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child != null));
  return element;
}

const percent = (share) => `${(100 * share).toFixed(share > 0.995 && share < 0.9995 ? 1 : 0)} %`;
const about = (worth) => (worth < 10 ? worth : Math.round(worth));
const count = (number, noun) => `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;

// A group of buttons is one tab stop; the arrow keys move the focus inside it.
function moveWithArrows(group) {
  const steps = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity };
  group.addEventListener("keydown", (event) => {
    const items = [...group.querySelectorAll("button.face")];
    const at = items.indexOf(document.activeElement);
    if (at < 0) return;
    let to = at;
    if (event.key in steps) to = Math.max(0, Math.min(items.length - 1, at + steps[event.key]));
    else if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      const { top, left } = items[at].getBoundingClientRect();
      const down = event.key === "ArrowDown";
      const rows = items
        .map((item, index) => ({ index, box: item.getBoundingClientRect() }))
        .filter(({ box }) => (down ? box.top > top + 4 : box.top < top - 4))
        .sort((a, b) => (down ? a.box.top - b.box.top : b.box.top - a.box.top)
          || Math.abs(a.box.left - left) - Math.abs(b.box.left - left));
      if (!rows.length) return;
      to = rows[0].index;
    } else return;
    event.preventDefault();
    event.stopPropagation();
    items[at].tabIndex = -1;
    items[to].tabIndex = 0;
    items[to].focus();
  });
}
