// Numbers and times as people read them, and colours of requests and ranks.

export const number = (value) => Math.round(value).toLocaleString("en");

export function rate(value) {
  if (value >= 10000) return `${(value / 1000).toFixed(value >= 100000 ? 0 : 1)}k`;
  return value >= 100 ? number(value) : value.toFixed(value >= 10 || value === 0 ? 0 : 1);
}

export function seconds(value) {
  if (value === null || value === undefined) return "";
  if (value < 10) return `${value.toFixed(1)} s`;
  if (value < 90) return `${Math.round(value)} s`;
  const minutes = value / 60;
  if (minutes < 90) return `${Math.round(minutes)} min`;
  return `${(minutes / 60).toFixed(1)} h`;
}

export function bytes(value) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let index = 0;
  while (value >= 999.5 && index < units.length - 1) [value, index] = [value / 1000, index + 1];
  return `${value >= 100 || index === 0 ? Math.round(value) : value.toPrecision(3)} ${units[index]}`;
}

export const plural = (count, noun) => `${number(count)} ${noun}${count === 1 ? "" : "s"}`;

const dark = matchMedia("(prefers-color-scheme: dark)");
export const isDark = () => dark.matches;
export const onTheme = (call) => dark.addEventListener("change", call);

/** Colour of a request: neighbours in number differ in hue by the golden angle. The two shades are its stripes. */
export function requestColor(id, isOdd = false) {
  const lightness = isDark() ? (isOdd ? 0.58 : 0.76) : isOdd ? 0.52 : 0.7;
  return `oklch(${lightness} 0.14 ${((id * 137.508 + 195) % 360).toFixed(1)})`;
}

/** Colour of a rank on a scale from the first to the last. */
export function rankColor(rank, numRanks) {
  const place = numRanks > 1 ? rank / (numRanks - 1) : 0;
  return `oklch(${isDark() ? 0.55 + 0.25 * place : 0.42 + 0.33 * place} 0.12 ${(265 - 185 * place).toFixed(1)})`;
}

export const cssColor = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/** Make an element with properties, attributes and children; texts are never read as HTML. */
export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in made) made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

/** Give a canvas as many pixels as it takes on the screen; returns its context, in CSS pixels, and its size. */
export function fitCanvas(canvas, width, height) {
  const scale = window.devicePixelRatio || 1;
  const [w, h] = [Math.round(width * scale), Math.round(height * scale)];
  if (canvas.width !== w || canvas.height !== h) [canvas.width, canvas.height] = [w, h];
  const context = canvas.getContext("2d");
  context.setTransform(scale, 0, 0, scale, 0, 0);
  context.clearRect(0, 0, width, height);
  return context;
}
