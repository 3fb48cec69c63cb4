// The index of a set: a prompt's page is loaded when it is asked for, into a frame.
(() => {
  const box = document.getElementById('prompts-table');
  const pages = box.dataset.pages.split('|');
  const frame = document.getElementById('frame'), opened = document.getElementById('opened');
  const { element } = Tables;
  let current = null;

  function open(row, page, prompt) {
    if (current) current.classList.remove('current');
    current = row;
    row.classList.add('current');
    const inside = element('iframe', { src: page, title: `Report: ${prompt}` });
    const close = element('button', { type: 'button', class: 'more' }, 'Close');
    close.addEventListener('click', () => {
      frame.replaceChildren();
      opened.replaceChildren();
      row.classList.remove('current');
      row.querySelector('.neuron').focus();
    });
    frame.replaceChildren(inside);
    opened.replaceChildren(element('strong', {}, prompt), ' ',
      element('a', { href: page, target: '_blank', rel: 'noopener' }, 'open on its own'), ' ', close);
    opened.scrollIntoView({ block: 'start' });
  }

  Tables.rowsOf(box.querySelector('table')).forEach((row, place) => {
    const cell = row.cells[0], prompt = cell.textContent;
    const button = element('button', { type: 'button', class: 'neuron' }, prompt);
    cell.replaceChildren(button);
    row.classList.add('opens');
    row.addEventListener('click', () => open(row, pages[place], prompt));
  });
  document.documentElement.dataset.ready = String(Math.round(performance.now()));
})();
