// One prompt's report: choosing a source position, lists of neurons, and their cards.
(() => {
  const all = JSON.parse(document.querySelector('script[data-name="report"]').textContent);
  const { element, bind } = Tables;
  const NAMES = { ffn: 'FFN value neuron', attn: 'attention value neuron', query: 'FFN query neuron',
    'suppressing-ffn': 'FFN neuron that lowers the answer',
    'suppressing-attn': 'attention neuron that lowers the answer' };
  const RANK = 0, NEURON = 1, SOURCE = 2, COEFFICIENT = 3, SCORE = 4, RAISES = 5, LOWERS = 6;
  const LISTED = 5;  // tokens in a table; a card has all
  const place = position => `${position}: ${all.tokens[position]}`;

  // three significant digits and a real minus sign, as in the rest of the page
  function number(value) {
    if (value === null || value === undefined) return '–';
    if (Number.isInteger(value)) return value.toLocaleString('en').replace('-', '−');
    const digits = Math.max(0, 2 - Math.floor(Math.log10(Math.abs(value))));
    const text = digits > 6 ? value.toExponential(1)
      : value.toLocaleString('en', { minimumFractionDigits: digits, maximumFractionDigits: digits });
    return text.replace('-', '−');
  }

  const texts = ids => ids.map(id => all.words[id]);

  const CELLS = {
    number: value => [number(value)],
    text: value => [value],
    source: value => [value === null ? '–' : place(value)],
    tokens: ids => texts(ids).slice(0, LISTED).map(text => element('code', {}, text)),
    neuron: value => [value],
  };

  function cell(kind, value, made) {
    const shown = made || CELLS[kind](value);
    return element('td', { class: { number: 'num', tokens: 'tokens' }[kind] || null }, ...shown);
  }

  function searched(kind, value) {
    if (kind === 'tokens') return texts(value).join(' ');
    if (kind === 'source') return value === null ? '' : place(value);
    return kind === 'number' ? number(value) : value;
  }

  const sortedBy = (kind, value) =>
    kind === 'tokens' ? (value.length ? all.words[value[0]] : null) : value;

  // a row whose <tr> and text are made when they are first needed
  function row(kinds, values, made) {
    let tr = null, text = null;
    return {
      values: values.map((value, at) => sortedBy(kinds[at], value)), raw: values,
      get text() {
        return text ??= values.map((value, at) => searched(kinds[at], value)).join(' ')
          .toLowerCase();
      },
      node() { return tr ??= made(); },
    };
  }

  const columnsOf = table => table.dataset.columns.split('|').map(each => each.split(':')[0]);

  // --- lists of neurons ---------------------------------------------------------------------

  const lists = {};
  for (const [name, found] of Object.entries(all.lists)) {
    const table = document.querySelector(`table[data-drawn="${name}"]`);
    const columns = columnsOf(table);
    const kept = columns.map((kind, at) => at).filter(at => columns[at] !== '-');
    const kinds = kept.map(at => columns[at]);
    const rows = found.map(values => {
      const mine = row(kinds, kept.map(at => values[at]), () => {
        const button = element('button', { type: 'button', class: 'neuron',
          'aria-haspopup': 'dialog' }, values[NEURON]);
        const tr = element('tr', { class: 'opens' }, ...kept.map((at, which) =>
          cell(kinds[which], values[at], at === NEURON ? [button] : null)));
        tr.addEventListener('click', () => { button.focus(); open(name, mine); });
        return tr;
      });
      return Object.assign(mine, { all: values });
    });
    lists[name] = bind(table, rows);
  }

  // --- what heads bring from each position ----------------------------------------------------

  const { heads, scores, attention, total } = all.positions;
  const label = ([layer, head]) => `L${layer}.H${head}`;
  const byPosition = document.querySelector('table[data-drawn="positions"]');
  const kinds = columnsOf(byPosition);
  const brought = bind(byPosition, heads.flatMap((head, at) => all.tokens.map((token, position) => {
    const values = [label(head), position, attention[at][position], scores[at][position]];
    return row(kinds, values, () =>
      element('tr', {}, ...values.map((value, which) => cell(kinds[which], value))));
  })).sort((a, b) => b.raw[3] - a.raw[3]));

  // --- choosing a source position -------------------------------------------------------------

  let chosen = null, head = 0;
  const strip = [...document.querySelectorAll('#strip button')];
  const most = Math.max(...total.map(Math.abs), 1e-12);
  strip.forEach((button, position) => {
    const rise = total[position];
    button.style.setProperty('--much', `${Math.round(100 * Math.abs(rise) / most)}%`);
    button.style.setProperty('--sign', rise < 0 ? 'var(--down)' : 'var(--up)');
    button.title = `Each head on its own from ${place(position)}: ${number(rise)} nats in sum`;
    button.addEventListener('click', () => choose(position === chosen ? null : position));
  });

  function headsFrom(figure) {
    const grid = figure.data[0].z.map(line => line.map(() => null));
    heads.forEach(([layer, which], at) => { grid[which][layer] = scores[at][chosen]; });
    const limit = Math.max(...grid.flat().map(value => Math.abs(value || 0))) || 1;
    Object.assign(figure.data[0], { z: grid, zmin: -limit, zmax: limit });
    return figure;
  }

  function positionsOf(figure) {
    const [bars, weights] = figure.data;
    const limit = Math.max(...scores[head].map(Math.abs)) || 1;
    bars.x = scores[head];
    Object.assign(bars.marker, { color: scores[head], cmin: -limit, cmax: limit });
    weights.x = attention[head];
    for (const trace of [bars, weights]) {
      trace.marker.opacity = all.tokens.map((_, at) => chosen === null || at === chosen ? 1 : 0.25);
    }
    return figure;
  }

  function caption(id, text) {
    const says = document.getElementById(`${id}-says`);
    says.dataset.first ??= says.textContent;
    says.textContent = text || says.dataset.first;
  }

  function choose(position) {
    chosen = position;
    strip.forEach((button, at) => button.setAttribute('aria-pressed', String(at === chosen)));
    const from = chosen === null ? null : place(chosen);
    document.getElementById('chosen').textContent = from === null
      ? 'Choose a token to see only what comes from there.'
      : `Only what comes from ${from}: heads, source positions and attention neurons. ` +
        'Click it again for all.';
    brought.filter(from === null ? null : each => each.raw[1] === chosen);
    for (const name of ['attn', 'suppressing-attn']) {
      if (lists[name]) lists[name].filter(from && (each => each.all[SOURCE] === chosen));
    }
    Figures.change('f-heads', from === null ? null : headsFrom);
    caption('f-heads', from && `What each attention head brings from ${from}`);
    Figures.change('f-positions', positionsOf);
    Figures.change('f-neurons', from === null ? null : figure => neuronsFrom(figure, chosen));
  }

  // the scatter names its marks where it says what hovering shows
  function neuronsFrom(figure, position) {
    figure.data.forEach(trace => {
      trace.selectedpoints = (trace.customdata || []).flatMap((says, at) => {
        const source = /^<b>[^<]*@(\d+)<\/b>/.exec(says);
        return !source || Number(source[1]) === position ? [at] : [];
      });
      trace.unselected = { marker: { opacity: 0.06 } };
    });
    return figure;
  }

  const select = document.getElementById('head');
  heads.forEach((each, at) => select.append(element('option', { value: at }, label(each))));
  select.addEventListener('change', () => {
    head = Number(select.value);
    Figures.change('f-positions', positionsOf);
    caption('f-positions', `What head ${label(heads[head])} brings from each token`);
  });

  // --- cards ------------------------------------------------------------------------------------

  const dialog = document.getElementById('card');
  let listed = null, current = null;

  function tokenLine(ends, sign) {
    return element('p', { class: 'ends' },
      element('span', { class: sign > 0 ? 'up' : 'down' }, sign > 0 ? 'raises ' : 'lowers '),
      ...ends.flatMap(([id, logit]) => [element('code', {},
        all.words[id] + (logit === null ? '' : ` ${number(logit)}`)), ' ']));
  }

  function cardTable({ title, text, columns, rows }) {
    const kinds = columns.map(each => each.split(':')[0]);
    const table = element('table', {},
      element('thead', {}, element('tr', {}, ...columns.map(each => element('th', { scope: 'col',
        class: each.startsWith('number:') ? 'num' : null }, each.split(':')[1])))),
      element('tbody', {}, ...rows.map(values =>
        element('tr', {}, ...values.map((value, at) => cell(kinds[at], value))))));
    return [element('h3', {}, title), element('div', { class: 'soft' }, text),
      element('div', { class: 'wide', tabindex: 0 }, table)];
  }

  function facts(values, card) {
    const found = [['score', `${number(values[SCORE])} nats`],
      ['coefficient', number(values[COEFFICIENT])],
      ['rank', `${number(values[RANK])}` + (card && card.rank
        ? ` of ${number(card.ranked)} listed; there are ${number(card.total)}` : '')]];
    if (values[SOURCE] !== null) {
      found.push([listed === 'query' ? 'fires at' : 'brings from', place(values[SOURCE])]);
    }
    if (card) {
      card.inputs.forEach(([name, value]) => found.push([`its input ${name}`, number(value)]));
      found.push(['its strongest token stands out by', `${number(card.readability)} sd`]);
    }
    return element('dl', {}, ...found.flatMap(([name, value]) =>
      [element('dt', {}, name), element('dd', {}, value)]));
  }

  function content(values) {
    const role = listed === 'query' ? 'query' : 'value';
    const card = all.cards[`${role} ${values[NEURON]}`];
    const plain = ids => ids.map(id => [id, null]);
    const says = [element('h3', {}, 'What it says here'),
      tokenLine(card ? card.raises : plain(values[RAISES]), 1),
      tokenLine(card ? card.lowers : plain(values[LOWERS]), -1)];
    if (card) {
      says.push(element('div', { class: 'soft' },
        'Numbers are logits per unit of coefficient: what the neuron itself points at.'));
      return [facts(values, card), ...says, ...card.tables.flatMap(cardTable),
        ...card.notes.map(note => element('p', { class: 'warn' }, note))];
    }
    const at = listed === 'query' && values[SOURCE] !== null ? ` --at ${values[SOURCE]}` : '';
    return [facts(values, null), ...says, element('p', { class: 'soft' },
      'Of this neuron the page holds only what the tables hold. What set it off and what it sets ' +
      'off are in whole cards, which the best neurons have here; for this one:'),
    element('pre', { tabindex: 0 },
      element('code', {}, all.command.replace('NEURON', values[NEURON]) + at))];
  }

  function show() {
    const order = lists[listed].order(), at = order.indexOf(current);
    const step = (by, text, says) => {
      const button = element('button', { type: 'button', 'aria-label': says, title: says }, text);
      button.disabled = !order[at + by];
      button.addEventListener('click', () => turn(by));
      return button;
    };
    const close = element('button', { type: 'button' }, 'Close');
    close.addEventListener('click', () => dialog.close());
    dialog.replaceChildren(
      element('div', { class: 'card-top' },
        element('h2', { id: 'card-name', tabindex: -1 }, `${current.all[NEURON]} `,
          element('small', { class: 'soft' }, NAMES[listed])),
        step(-1, '←', 'Previous neuron (left arrow)'), step(1, '→', 'Next neuron (right arrow)'),
        close),
      element('div', { class: 'card-body' }, ...content(current.all)));
    dialog.scrollTop = 0;
    document.getElementById('card-name').focus();
  }

  function open(name, which) {
    listed = name;
    current = which;
    if (!dialog.open) dialog.showModal();
    show();
  }

  function turn(by) {
    const order = lists[listed].order();
    const next = order[order.indexOf(current) + by];
    if (next) { current = next; show(); }
  }

  dialog.addEventListener('keydown', event => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by || event.target.closest('.wide, pre')) return;  // there they scroll
    event.preventDefault();
    turn(by);
  });
  dialog.addEventListener('click', event => { if (event.target === dialog) dialog.close(); });
  // to the neuron that was looked at last, where it is drawn; else the browser goes where it was
  dialog.addEventListener('close', () => {
    const button = current.node().querySelector('.neuron');
    if (button.isConnected) button.focus();
  });

  document.documentElement.dataset.ready = String(Math.round(performance.now()));
})();
