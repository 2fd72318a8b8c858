// The map of the report: zoom, pan, search by name, and the images nearest to a chosen one. It loads nothing.
(() => {
  'use strict';
  const data = JSON.parse(document.getElementById('map-data').textContent);
  const root = document.getElementById('map-root');
  const { names, encoders, cell, columns, size } = data;
  const n = names.length;
  const groups = data.groups || [], classes = data.classes || [];
  const lower = names.map((name, i) => `${name} ${classes[i] || ''}`.toLowerCase());
  const sprite = new Image();
  let encoder = 0, chosen = -1, found = null, view = { x: 0.5, y: 0.5, scale: 1 };

  // Make an element; text is never read as HTML.
  const make = (tag, attributes, ...children) => {
    const element = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes || {})) {
      if (key.startsWith('on')) element.addEventListener(key.slice(2), value);
      else element.setAttribute(key, value);
    }
    element.append(...children);
    return element;
  };

  const canvas = make('canvas', { tabindex: 0, 'aria-label': 'map of the images' });
  const search = make('input', { type: 'search', placeholder: 'search by name', 'aria-label': 'search by name' });
  const count = make('span', { class: 'found' });
  const hits = make('div', { class: 'hits' });
  const detail = make('div', { class: 'detail', 'aria-live': 'polite' });
  const button = (text, label, action) => make('button', { type: 'button', title: label, onclick: action }, text);
  const bar = make('div', { class: 'bar' }, search, count);
  if (encoders.length > 1) {
    const choice = make('span', { class: 'choice', role: 'radiogroup', 'aria-label': 'encoder' });
    encoders.forEach((e, i) => {
      const radio = make('input', { type: 'radio', name: 'map-encoder', onchange: () => { encoder = i; move(); } });
      radio.checked = i === 0;
      choice.append(make('label', {}, radio, ` ${e.name}`));
    });
    bar.append(choice);
  }
  bar.append(make('span', { class: 'zoom' },
    button('−', 'zoom out', () => zoom(1 / 1.5)), button('+', 'zoom in', () => zoom(1.5)),
    button('all', 'show all', () => { view = { x: 0.5, y: 0.5, scale: 1 }; draw(); })));
  root.replaceChildren(bar, canvas, hits, detail);

  // ---- positions: shares of the map's width and height -> pixels of the screen

  let shown = encoders[0].points.map((p) => [...p]); // while they move from one encoder's to another's
  const width = () => canvas.clientWidth, height = () => canvas.clientHeight, margin = 40;
  const toScreen = ([x, y]) => [
    width() / 2 + (x - view.x) * view.scale * (width() - 2 * margin),
    height() / 2 + (y - view.y) * view.scale * (height() - 2 * margin)];
  const move = () => {
    const from = shown.map((p) => [...p]), to = encoders[encoder].points, begin = performance.now();
    const still = window.matchMedia('(prefers-reduced-motion: reduce)').matches;
    const step = (now) => {
      const t = still ? 1 : Math.min(1, (now - begin) / 600), s = t * t * (3 - 2 * t);
      shown = from.map((p, i) => [p[0] + s * (to[i][0] - p[0]), p[1] + s * (to[i][1] - p[1])]);
      draw();
      if (t < 1) requestAnimationFrame(step);
    };
    requestAnimationFrame(step);
  };

  // ---- drawing

  const order = Array.from({ length: n }, (_, i) => (i * 7919 + 13) % n); // mixed, the same each time
  if (new Set(order).size !== n) order.splice(0, n, ...Array.from({ length: n }, (_, i) => i));
  let drawn = []; // [image, left, top, side], in the order of drawing
  const side = () => Math.round(Math.min(96, 38 * Math.sqrt(view.scale)));
  const [wide, high] = size[0] >= size[1] ? [1, size[1] / size[0]] : [size[0] / size[1], 1];
  const picture = (context, i, x, y, s) => context.drawImage(sprite,
    (i % columns) * cell[0], Math.floor(i / columns) * cell[1], cell[0], cell[1], x, y, s * wide, s * high);

  function draw() {
    const ratio = window.devicePixelRatio || 1, context = canvas.getContext('2d');
    const [w, h] = [Math.round(width() * ratio), Math.round(height() * ratio)];
    if (canvas.width !== w || canvas.height !== h) { canvas.width = w; canvas.height = h; }
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, width(), height());
    context.imageSmoothingEnabled = cell[0] >= 32;
    const style = getComputedStyle(document.body), s = side(), places = shown.map(toScreen);
    context.fillStyle = style.getPropertyValue('--muted');
    const inside = ([x, y]) => x > -s && y > -s && x < width() + s && y < height() + s;
    const dim = (i) => found && !found.has(i);
    for (let i = 0; i < n; i++) {
      if (!inside(places[i])) continue;
      context.globalAlpha = dim(i) ? 0.12 : 0.6;
      context.fillRect(places[i][0] - 1.5, places[i][1] - 1.5, 3, 3);
    }
    context.globalAlpha = 1;
    drawn = [];
    const taken = new Map(), at = (a, b) => `${a},${b}`; // one image a square of the grid, none over another
    const fits = ([x, y]) => {
      const [a, b] = [Math.floor(x / s), Math.floor(y / s)];
      for (let i = a - 1; i <= a + 1; i++) {
        for (let j = b - 1; j <= b + 1; j++) {
          const other = taken.get(at(i, j));
          if (other && Math.abs(other[0] - x) < s && Math.abs(other[1] - y) < s) return false;
        }
      }
      taken.set(at(a, b), [x, y]);
      return true;
    };
    const near = chosen < 0 ? [] : encoders[encoder].near[chosen];
    const first = chosen < 0 ? [] : [chosen, ...near];
    const rest = found ? [...found] : order;
    for (const i of [...first, ...rest]) {
      if (drawn.length > 600) break;
      if (!inside(places[i]) || !fits(places[i])) continue;
      const [x, y] = [places[i][0] - s / 2 * wide, places[i][1] - s / 2 * high];
      picture(context, i, x, y, s);
      drawn.push([i, x, y, s]);
    }
    for (const i of first) {
      const place = drawn.find((d) => d[0] === i);
      const [x, y] = place ? place.slice(1, 3) : [places[i][0] - 4, places[i][1] - 4];
      context.strokeStyle = i === chosen ? '#d55e00' : '#0072b2';
      context.lineWidth = 3;
      context.strokeRect(x, y, place ? s * wide : 8, place ? s * high : 8);
    }
  }

  // ---- choosing: the image, and the nearest ones by each encoder

  const thumbnail = (i, pixels, caption, other) => {
    const small = make('canvas', {});
    const scale = pixels / 1;
    small.width = Math.max(1, Math.round(scale * wide * 2));
    small.height = Math.max(1, Math.round(scale * high * 2));
    small.style.width = `${Math.round(scale * wide)}px`;
    const context = small.getContext('2d');
    context.imageSmoothingEnabled = cell[0] >= 32;
    picture(context, i, 0, 0, 2 * pixels);
    return make('button', { type: 'button', class: other ? 'other' : '', title: names[i], onclick: () => choose(i) },
      small, make('span', {}, caption));
  };
  const base = (name) => name.split('/').pop();
  function choose(i) {
    chosen = i;
    const about = [names[i]];
    if (classes[i]) about.push(`class ${classes[i]}`);
    if (groups[i]) about.push(`group ${groups[i]}`);
    detail.replaceChildren(make('div', { class: 'chosen' }, thumbnail(i, 128, '', false),
      make('p', {}, about.join(' · '))));
    for (const e of encoders) {
      const row = make('div', { class: 'row' });
      e.near[i].forEach((j, k) => row.append(thumbnail(j, 84, `${e.cosine[i][k].toFixed(2)} ${base(names[j])}`,
        classes[i] && classes[j] && classes[i] !== classes[j])));
      detail.append(make('h4', {}, encoders.length > 1 ? `nearest by the ${e.name} encoder` : 'nearest'), row);
    }
    draw();
  }

  search.addEventListener('input', () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    found = words.length ? new Set(lower.flatMap((name, i) => words.every((w) => name.includes(w)) ? [i] : [])) : null;
    count.textContent = found ? `${found.size} found` : '';
    hits.replaceChildren(...[...(found || [])].slice(0, 24).map((i) => thumbnail(i, 64, base(names[i]), false)));
    draw();
  });

  // ---- zoom and pan; the wheel zooms only with Ctrl or after a click on the map, so that the page still scrolls

  function zoom(factor, x = width() / 2, y = height() / 2) {
    const scale = Math.min(60, Math.max(1, view.scale * factor)), k = 1 / view.scale - 1 / scale;
    view = {
      x: view.x + (x - width() / 2) * k / (width() - 2 * margin),
      y: view.y + (y - height() / 2) * k / (height() - 2 * margin),
      scale,
    };
    draw();
  }
  const fingers = new Map();
  let dragged = 0;
  canvas.addEventListener('wheel', (event) => {
    if (!event.ctrlKey && document.activeElement !== canvas) return;
    event.preventDefault();
    zoom(Math.exp(-event.deltaY * (event.ctrlKey ? 0.01 : 0.002)), event.offsetX, event.offsetY);
  }, { passive: false });
  canvas.addEventListener('pointerdown', (event) => {
    canvas.setPointerCapture(event.pointerId);
    fingers.set(event.pointerId, [event.offsetX, event.offsetY]);
    dragged = 0;
  });
  canvas.addEventListener('pointermove', (event) => {
    const before = fingers.get(event.pointerId);
    if (!before) return;
    const now = [event.offsetX, event.offsetY];
    const others = [...fingers].filter(([id]) => id !== event.pointerId).map(([, p]) => p);
    if (others.length) {
      const apart = (p) => Math.hypot(p[0] - others[0][0], p[1] - others[0][1]) || 1;
      zoom(apart(now) / apart(before), (now[0] + others[0][0]) / 2, (now[1] + others[0][1]) / 2);
    } else {
      view.x -= (now[0] - before[0]) / view.scale / (width() - 2 * margin);
      view.y -= (now[1] - before[1]) / view.scale / (height() - 2 * margin);
      draw();
    }
    dragged += Math.hypot(now[0] - before[0], now[1] - before[1]);
    fingers.set(event.pointerId, now);
  });
  const lift = (event) => {
    fingers.delete(event.pointerId);
    if (event.type !== 'pointerup' || dragged > 5) return;
    const [x, y] = [event.offsetX, event.offsetY];
    const hit = drawn.find(([, a, b, s]) => x >= a && x <= a + s * wide && y >= b && y <= b + s * high);
    if (hit) { choose(hit[0]); return; }
    let best = -1, least = 12; // a dot
    shown.forEach((p, i) => {
      const [a, b] = toScreen(p), d = Math.hypot(a - x, b - y);
      if (d < least) { best = i; least = d; }
    });
    if (best >= 0) choose(best);
  };
  canvas.addEventListener('pointerup', lift);
  canvas.addEventListener('pointercancel', lift);
  canvas.addEventListener('pointermove', (event) => {
    const hit = drawn.find(([, a, b, s]) => event.offsetX >= a && event.offsetX <= a + s && event.offsetY >= b
      && event.offsetY <= b + s);
    canvas.title = hit ? names[hit[0]] : '';
  });
  canvas.addEventListener('keydown', (event) => {
    const step = 0.1 / view.scale;
    const moves = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] };
    if (moves[event.key]) {
      view.x += moves[event.key][0];
      view.y += moves[event.key][1];
      draw();
    } else if (event.key === '+' || event.key === '=') zoom(1.5);
    else if (event.key === '-') zoom(1 / 1.5);
    else return;
    event.preventDefault();
  });
  window.addEventListener('resize', draw);
  sprite.addEventListener('load', draw);
  sprite.src = data.sprite;
})();
