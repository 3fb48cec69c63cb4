// Every table is sorted by its headings; a longer one is searched, and comes in pieces.
const Tables = (() => {
  const WHOLE = 50, FIRST = 25, MORE = 200, SEARCHED_FROM = 11;
  const natural = new Intl.Collator('en', { numeric: true });
  const EMPTY = new Set(['', '–']);

  // "1,234", "−0.5", "12 %" and what data-v says exactly are numbers; anything else is text
  function value(text) {
    const shown = text.trim();
    if (EMPTY.has(shown)) return null;
    const plain = shown.replace(/−/g, '-').replace(/,/g, '').replace(/\s*%$/, '');
    return plain !== '' && isFinite(plain) ? Number(plain) : shown;
  }

  function compare(a, b, column, direction) {
    const x = a.values[column], y = b.values[column];
    if (x === null || y === null) return (x === null) - (y === null);  // empty cells last
    const order = typeof x === 'number' && typeof y === 'number'
      ? x - y : natural.compare(String(x), String(y));
    return direction * order;
  }

  function element(name, attributes, ...children) {
    const made = document.createElement(name);
    Object.entries(attributes || {}).forEach(([key, each]) => {
      if (each !== null && each !== undefined) made.setAttribute(key, each);
    });
    made.append(...children);
    return made;
  }

  // rows: { values: one a column, text: what is searched, node: () => the <tr> }
  function bind(table, rows) {
    const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
    const count = element('span', { 'aria-live': 'polite', class: 'count' });
    const more = element('button', { type: 'button', class: 'more' });
    let sorted = rows, column = -1, direction = 0, words = [], kept = () => true;
    const first = rows.length > WHOLE ? FIRST : WHOLE;
    let limit = first;

    function show() {
      const found = sorted.filter(row => kept(row) && words.every(word => row.text.includes(word)));
      const shown = found.slice(0, limit);
      body.replaceChildren(...shown.map(row => row.node()));
      const of = found.length === rows.length ? '' : ` of ${rows.length.toLocaleString('en')}`;
      const noun = rows.length === 1 ? 'row' : 'rows';
      count.textContent = shown.length < found.length
        ? `${shown.length} shown of ${found.length.toLocaleString('en')} rows` +
          (of && ` (of ${rows.length.toLocaleString('en')})`)
        : `${found.length.toLocaleString('en')}${of} ${noun}`;
      const left = found.length - shown.length;
      more.hidden = left <= 0;
      more.textContent = left > MORE ? `Show ${MORE} more` : `Show the other ${left}`;
    }

    function sort(place) {
      const numbers = rows.every(row => row.values[place] === null ||
        typeof row.values[place] === 'number');
      const first = numbers ? -1 : 1;  // of numbers the largest are wanted, of names the first
      direction = place !== column ? first : direction === first ? -first : 0;
      column = place;
      sorted = direction ? [...rows].sort((a, b) => compare(a, b, place, direction)) : rows;
      heads.forEach((head, at) => {
        if (at === place && direction) {
          head.setAttribute('aria-sort', direction > 0 ? 'ascending' : 'descending');
        } else {
          head.removeAttribute('aria-sort');
        }
      });
      show();
    }

    heads.forEach((head, place) => {
      const button = element('button', { type: 'button', class: 'sort',
        title: 'Sort; again to turn round, and again for the first order' }, ...head.childNodes);
      button.addEventListener('click', () => sort(place));
      head.replaceChildren(button);
    });
    more.addEventListener('click', () => { limit += MORE; show(); });

    const bar = element('div', { class: 'tools' });
    if (rows.length >= SEARCHED_FROM) {
      const field = element('input', { type: 'search', placeholder: 'Search', spellcheck: 'false',
        'aria-label': `Search: ${table.caption ? table.caption.textContent : 'this table'}` });
      field.addEventListener('input', () => {
        words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
        limit = first;
        show();
      });
      bar.append(field);
    }
    bar.append(count);
    const box = table.closest('.wide') || table;
    box.before(bar);
    box.after(more);
    show();
    window.addEventListener('beforeprint', () => { limit = Infinity; show(); });
    return {
      // only rows for which this is true; null for all
      filter(test) { kept = test || (() => true); limit = first; show(); },
      // the rows as they stand now, those not drawn yet included
      order() {
        return sorted.filter(row => kept(row) && words.every(word => row.text.includes(word)));
      },
    };
  }

  function ofCells(row) {
    const cells = [...row.cells];
    return { values: cells.map(cell => value(cell.dataset.v || cell.textContent)),
      text: row.textContent.toLowerCase(), node: () => row };
  }

  const whole = new WeakMap();  // a table's rows in their first order, shown or not
  const rowsOf = table => whole.get(table);

  function start() {
    document.querySelectorAll('table:not([data-drawn])').forEach(table => {
      if (table.tHead && table.tBodies.length) {
        whole.set(table, [...table.tBodies[0].rows]);
        bind(table, whole.get(table).map(ofCells));
      }
    });
  }

  return { bind, element, rowsOf, start };
})();
Tables.start();
