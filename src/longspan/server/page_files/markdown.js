// A little Markdown, as models write it: code blocks, inline code and bold. All else is text.

import { element } from "./format.js";

function inline(text) {
  const parts = [];
  for (const piece of text.split(/(`[^`\n]+`|\*\*[^*\n]+\*\*)/)) {
    if (/^`[^`]+`$/.test(piece)) parts.push(element("code", {}, piece.slice(1, -1)));
    else if (/^\*\*[^*]+\*\*$/.test(piece)) parts.push(element("b", {}, piece.slice(2, -2)));
    else if (piece) parts.push(piece);
  }
  return parts;
}

/** Return the elements of a text; a code block that is not closed yet counts. */
export function render(text) {
  const made = [];
  text.split(/^```[^\n]*\n?/m).forEach((piece, i) => {
    if (i % 2 === 1) {
      made.push(element("pre", { tabIndex: 0 }, element("code", {}, piece.replace(/\n$/, ""))));
      return;
    }
    for (const paragraph of piece.split(/\n{2,}/)) {
      if (paragraph.trim()) made.push(element("p", {}, ...inline(paragraph.replace(/^\n+|\s+$/g, ""))));
    }
  });
  return made;
}
