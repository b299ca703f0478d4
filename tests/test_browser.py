"""The notebooks with widgets in a real browser: opened in JupyterLab, run, and worked as a reader would, with the mouse and the keyboard.
Only here does an exception inside a callback show. Pictures of what was seen go to artifacts/."""
import contextlib, json, os, re, shutil, socket, subprocess, sys, time, urllib.error, urllib.request, warnings
from pathlib import Path
import pytest

ROOT, TOKEN = Path(__file__).resolve().parents[1], 'readers'
ARTIFACTS = ROOT/'artifacts'
ARGS = '--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync'.split()

def shows_a_panel(path):
    "Whether a notebook makes an explorer"
    return any(re.search(r'^\w*Explorer\(|= \w*Explorer\(', ''.join(c['source']), re.M) for c in json.loads(path.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code')

NOTEBOOKS = [p.stem for p in sorted((ROOT/'nbs').glob('*.ipynb')) if shows_a_panel(p)]


def missing(why):
    "Without a browser nothing here can be checked: loud at home, a failure where the checks must not shrink"
    why += ': `pip install playwright` and then `playwright install chromium`, or Chromium from your system (Debian: apt install chromium)'
    if os.environ.get('CI'): pytest.fail(why)
    warnings.warn(f'THE WIDGETS WERE NOT TESTED. {why}')
    pytest.skip(why)


def free_port():
    with contextlib.closing(socket.socket()) as s: s.bind(('127.0.0.1', 0)); return s.getsockname()[1]

def call(url, **body):
    "A request to the server; with the token in its head it needs no further check"
    rq = urllib.request.Request(url, json.dumps(body).encode() if body else None, {'Content-Type': 'application/json', 'Authorization': f'token {TOKEN}'})
    with urllib.request.urlopen(rq, timeout=30) as r: return json.load(r)

def wait_for(server, log, base):
    for _ in range(360):
        if server.poll() is not None: pytest.fail(log.read_text()[-3000:])
        try: return call(base + '/api/status')
        except (OSError, urllib.error.URLError): time.sleep(.25)
    pytest.fail('JupyterLab did not come up: ' + log.read_text()[-3000:])


@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    "JupyterLab over copies of the notebooks, with settings of its own: nothing of the user's is read or written"
    tmp = tmp_path_factory.mktemp('lab'); root = tmp/'root'; root.mkdir()
    for n in NOTEBOOKS: shutil.copy(ROOT/f'nbs/{n}.ipynb', root)
    own = {k: str(tmp/k) for k in 'JUPYTERLAB_SETTINGS_DIR JUPYTERLAB_WORKSPACES_DIR JUPYTER_CONFIG_DIR JUPYTER_RUNTIME_DIR'.split()}
    for place, what in {'apputils-extension/notification': dict(fetchNews='false', checkForUpdates=False),
                        'notebook-extension/tracker': dict(windowingMode='none')}.items():  # all cells are in the page, also those out of sight
        f = Path(own['JUPYTERLAB_SETTINGS_DIR'])/'@jupyterlab'/f'{place}.jupyterlab-settings'
        f.parent.mkdir(parents=True); f.write_text(json.dumps(what))
    port, log = free_port(), tmp/'server.log'; base = f'http://127.0.0.1:{port}'
    env = {**os.environ, **own, 'HF_HUB_OFFLINE': '1', 'OMP_NUM_THREADS': '1', 'PYTHONPATH': os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))}
    with log.open('w') as f:
        p = subprocess.Popen([sys.executable, '-m', 'jupyterlab', '--no-browser', '--allow-root', '--ServerApp.ip=127.0.0.1', f'--ServerApp.port={port}',
                              '--ServerApp.port_retries=0', f'--IdentityProvider.token={TOKEN}', f'--ServerApp.root_dir={root}'],
                             stdout=f, stderr=subprocess.STDOUT, env=env)
        try: wait_for(p, log, base); yield base
        finally:
            p.terminate()
            try: p.wait(20)
            except subprocess.TimeoutExpired: p.kill(); p.wait()


def found(): return next(filter(None, map(shutil.which, ['chromium', 'google-chrome', 'chromium-browser'])), None)

def fetch():
    "Chromium where there is none: from the system's packages for root on Debian and its kin, as in a container; else playwright's own"
    root = hasattr(os, 'geteuid') and not os.geteuid() and shutil.which('apt-get')
    commands = [['apt-get', 'update', '-qq'], ['apt-get', 'install', '-y', '-qq', 'chromium']] if root else [[sys.executable, '-m', 'playwright', 'install', 'chromium']]
    with contextlib.suppress(subprocess.SubprocessError, OSError):
        for c in commands: subprocess.run(c, timeout=400, check=True, stdout=subprocess.DEVNULL, env={**os.environ, 'DEBIAN_FRONTEND': 'noninteractive'})

def launch(p):
    "The system's Chromium, or the one of playwright; one is fetched where there is none and that is possible"
    if not found() and not Path(p.chromium.executable_path).exists(): fetch()
    try: return p.chromium.launch(executable_path=found(), args=ARGS)
    except Exception as e: missing(f'no Chromium starts here ({str(e).splitlines()[0]})')

@pytest.fixture(scope='module')
def browser():
    try: from playwright.sync_api import sync_playwright
    except ImportError: missing('playwright is not installed')
    ARTIFACTS.mkdir(exist_ok=True)
    with sync_playwright() as p: b = launch(p); yield b; b.close()


class Notebook:
    "A notebook that was run from top to bottom"
    def __init__(self, lab, browser, name):
        self.name, self.errors, self.lab = name, [], lab
        path = f'{name}.ipynb'  # the session first: the page joins its kernel; else JupyterLab may start two and drop one
        self.session = call(lab + '/api/sessions', path=path, name=path, type='notebook', kernel={'name': 'python3'})
        self.page = browser.new_page(viewport={'width': 1200, 'height': 1000})
        self.page.on('pageerror', lambda e: self.errors.append(str(e)))
        self.page.goto(f'{lab}/doc/tree/{path}?token={TOKEN}')
        self.page.locator('#jp-main-statusbar').get_by_text('| Idle').wait_for(timeout=90_000)
        for item in ('Run', 'Run All Cells'): self.page.get_by_role('menuitem', name=item, exact=True).click()
        count = "[...document.querySelectorAll('.jp-CodeCell .jp-InputArea .jp-InputPrompt')].filter(e => e.offsetParent !== null).at(-1).innerText"
        self.page.wait_for_function(f'/\\d/.test({count}) || !!document.querySelector(\'[data-mime-type="application/vnd.jupyter.error"]\')', timeout=240_000)
        self.fine()

    def fine(self):
        "No error in any cell, none of the page"
        bad = self.page.locator('[data-mime-type="application/vnd.jupyter.error"], [data-mime-type="application/vnd.jupyter.stderr"]')
        assert not bad.count(), bad.all_inner_texts()
        assert not self.errors

    def panel(self, k=0): return Panel(self, self.page.locator('.explore').nth(k))
    def picture(self, name): self.page.screenshot(path=ARTIFACTS/f'{self.name}-{name}.png')
    def close(self):
        self.page.close()
        urllib.request.urlopen(urllib.request.Request(f'{self.lab}/api/sessions/{self.session["id"]}', method='DELETE', headers={'Authorization': f'token {TOKEN}'})).close()


class Panel:
    "One panel of widgets in a notebook"
    def __init__(self, notebook, root):
        self.notebook, self.root = notebook, root
        root.scroll_into_view_if_needed(timeout=30_000)
        self.img.wait_for(timeout=30_000)

    @property
    def img(self): return self.root.locator('.explore-picture img')
    @property
    def src(self): return self.img.get_attribute('src')
    @property
    def status(self): return self.root.locator('.explore-said').inner_text().strip()
    @property
    def numbers(self): return self.root.locator('.explore-numbers').inner_text()
    @property
    def verdict(self): return self.root.locator('.verdict').inner_text()
    @property
    def lost(self): return float(re.search(r'([\d.]+)%', self.verdict)[1])/100

    def __call__(self, name, inside=''): return self.root.locator(f'.explore-{name} {inside}'.strip())
    def has(self, name): return bool(self(name).count())
    def option(self, name, label): self(name, 'select').select_option(label)
    def options(self, name): return self(name, 'select').locator('option').all_inner_texts()
    def write(self, name, text): self(name, 'input').fill(text); self(name, 'input').press('Enter')
    def check(self, name): self(name, 'input').click()
    def slide(self, name, key, times=1):
        handle = self(name, '.noUi-handle').first
        handle.focus()
        for _ in range(times): handle.press(key)

    def until(self, true, what, seconds=30):
        for _ in range(10*seconds):
            if true(): return
            self.notebook.page.wait_for_timeout(100)
        self.notebook.picture('failed'); pytest.fail(f'{what}: status {self.status!r}, numbers {self.numbers!r}')

    @contextlib.contextmanager
    def changes(self, numbers=True, picture=True):
        "What is done inside changes the picture, and the numbers"
        src, before = self.src, self.numbers
        yield
        if picture: self.until(lambda: self.src != src, 'the picture stayed as it was')
        if numbers: self.until(lambda: self.numbers != before, 'the numbers stayed as they were')
        self.until(lambda: 'working' not in self.status, 'still at work')
        assert '✗' not in self.status, self.status

    @contextlib.contextmanager
    def refuses(self, words):
        "What is done inside is answered by a sentence, and the picture stays"
        src = self.src
        yield
        self.until(lambda: words in self.status, f'nothing said {words!r}')
        assert self.src == src


@pytest.fixture(scope='module')
def notebook(request, lab, browser):
    nb = Notebook(lab, browser, request.param)
    yield nb
    nb.close()


def of(*names): return pytest.mark.parametrize('notebook', [n for n in names if n in NOTEBOOKS], indirect=True)

def test_the_notebooks_are_found(): assert {'18_explore', '30_vit', '31_mixer', '32_clip', '33_llama', '34_sentences'} <= set(NOTEBOOKS)

@of(*NOTEBOOKS)
def test_every_panel_answers(notebook):
    "In each notebook: the controls that a panel has change what it shows, rules break the account and mend it"
    panels = notebook.page.locator('.explore')
    assert panels.count(), 'no panel in this notebook'
    for k in range(panels.count()):
        p = notebook.panel(k)
        for control, work in dict(rule_layernorm=rules, method=methods, gone=deletion).items():
            if p.has(control): work(p)
        notebook.picture(f'panel-{k}')
    notebook.fine()

@of('30_vit')
def test_figures_with_controls_work_in_a_notebook_too(notebook):
    figure = notebook.page.locator('libra-frames').first
    figure.scroll_into_view_if_needed(timeout=30_000)
    before = figure.locator('img').get_attribute('src')
    figure.locator('input').first.click()
    assert figure.locator('img').get_attribute('src') != before
    notebook.fine()

def rules(p):
    assert p.lost < .001 and '✓' in p.verdict
    with p.changes(): p.check('rule_layernorm')
    assert p.lost > .1 and '✗' in p.verdict
    with p.changes(): p.check('rule_layernorm')
    assert p.lost < .001 and '✓' in p.verdict

def methods(p):
    with p.changes(): p.option('method', 'gradient_norm')
    assert 'no unit' in p.verdict
    with p.changes(): p.option('method', 'input_x_gradient')
    p.option('method', 'fullgrad_plus')
    p.until(lambda: '✓' in p.verdict and 'fullgrad_plus' in p.img.get_attribute('alt'), 'not back')

def deletion(p):
    with p.changes(): p.slide('gone', 'ArrowRight', 4)
    p.until(lambda: 'without' in p.numbers, 'no word of what was taken away')
    with p.changes(): p.slide('gone', 'Home')
    p.until(lambda: 'without' not in p.numbers, 'still without')


@of('34_sentences')
def test_sentences(notebook):
    p = notebook.panel()
    with p.changes(): p.write('second', 'A kitten sleeps in the barn.')
    with p.refuses('mpty'): p.write('first', ' ')
    with p.changes(): p.write('first', 'The cat lies on the straw.')
    with p.changes(numbers=False): p.check('pairs')
    notebook.fine()


@pytest.fixture
def explorer(notebook):
    yield notebook.panel(0)
    notebook.fine()

@of('18_explore')
def test_classes_and_images(explorer):
    p = explorer
    with p.changes(): p.option('target', p.options('target')[2])
    with p.refuses('There is no class'): p.write('other', 'eleven')
    with p.changes(): p.write('other', 'seven')
    assert 'seven' in p.numbers
    with p.changes(): p.option('which', 'image 1')
    with p.changes():
        p.option('method', 'smooth_grad')
        p.until(lambda: 'working' in p.status, 'long work, and nothing says so')
    with p.changes(numbers=False): p.slide('opacity', 'ArrowLeft', 6)
    with p.changes(numbers=False): p.slide('scale', 'ArrowLeft', 6)

@of('18_explore')
def test_blocks(explorer):
    p = explorer
    with p.changes(): p.option('method', 'fullgrad_plus')
    assert p('blocks', '.noUi-target').get_attribute('disabled') is None
    with p.changes(): p('blocks', '.noUi-handle').last.press('ArrowLeft')
    with p.changes(): p.option('method', 'pixel_x_gradient')
    assert p('blocks', '.noUi-target').get_attribute('disabled') is not None
    with p.changes(): p.option('method', 'fullgrad')
    with p.changes(): p('blocks', '.noUi-handle').last.press('ArrowRight')
    with p.changes(): p.option('method', 'fullgrad_plus')

def upload(p, file):
    with p.notebook.page.expect_file_chooser() as chosen: p('upload').click()
    chosen.value.set_files(file)

@of('18_explore')
def test_upload(explorer, tmp_path):
    from PIL import Image
    p = explorer
    Image.new('RGB', (90, 70), (200, 40, 90)).save(tmp_path/'red.png'); (tmp_path/'note.png').write_text('no picture')
    with p.refuses('is no image'): upload(p, tmp_path/'note.png')
    with p.changes(): upload(p, tmp_path/'red.png')
    assert 'red.png' in p.options('which')

@of('18_explore')
def test_prompts(explorer):
    p = explorer.notebook.panel(1)
    with p.changes(): p.write('prompts', 'something green, a three')
    assert len(p.options('target')) == 2
    with p.refuses('no prompt of these models'): p.write('prompts', 'a purple seven')
    with p.refuses('The prompt is empty'): p.write('prompts', '  ')
    with p.changes(): p.write('prompts', 'a blue three')

@of('18_explore')
def test_texts(explorer):
    p = explorer.notebook.panel(2)
    with p.changes(): p.option('which', p.options('which')[1])
    with p.changes(): p.slide('last', 'ArrowLeft')
    with p.refuses('There is no class'): p.write('other', 'xylophone')
    with p.changes(): p.write('other', 'red')

@of('18_explore')
def test_rule_lab(explorer):
    p = explorer.notebook.panel(3)
    for op in ('softmax attention (first of three words)', 'LayerNorm (first of three channels)', 'SwiGLU product'):
        with p.changes(): p.option('op', op)
        assert '✗' in p('numbers', '.plain').inner_text() and 'adds up' in p('numbers', '.balanced').inner_text()
    with p.changes(): p.slide('first', 'ArrowRight', 3)


@of('18_explore')
def test_reachable_and_readable(explorer):
    "Every control has a name and is reached by the keyboard; nothing is cut off at 700 px; the text is readable in the dark"
    p, page = explorer, explorer.notebook.page
    assert p.root.locator('.noUi-handle').count() >= 5
    assert not p.root.evaluate(UNNAMED)
    page.set_viewport_size({'width': 700, 'height': 1000})
    page.wait_for_timeout(500); p.root.scroll_into_view_if_needed(); explorer.notebook.picture('narrow')
    assert p.root.evaluate('e => e.scrollWidth <= e.clientWidth + 1')
    page.set_viewport_size({'width': 1200, 'height': 1000})
    page.get_by_role('menuitem', name='Settings', exact=True).click()
    for item in ('Theme', 'JupyterLab Dark'): page.locator('.lm-Menu-itemLabel', has_text=re.compile(f'^{item}$')).click()
    page.wait_for_function("document.body.dataset.jpThemeLight === 'false'", timeout=20_000); page.wait_for_timeout(500)
    p.root.scroll_into_view_if_needed(); explorer.notebook.picture('dark')
    for part in ('numbers', 'said'):
        assert p(part).evaluate(CONTRAST) > 4.5, part

UNNAMED = '''root => [...root.querySelectorAll('select, input, button, .noUi-handle')].filter(e => e.offsetParent !== null).filter(e => {
    const name = e.labels?.[0]?.innerText || e.innerText || e.closest('.widget-inline-hbox')?.querySelector('.widget-label')?.innerText; // of a slider the text beside it
    return !name?.trim() || e.tabIndex < 0 }).map(e => e.outerHTML.slice(0, 120))'''

CONTRAST = '''e => { // of the text on what lies behind it
    const light = c => { const [r, g, b] = c.map(v => (v/255 <= .04045) ? v/255/12.92 : ((v/255 + .055)/1.055)**2.4); return .2126*r + .7152*g + .0722*b };
    const numbers = s => s.match(/[\\d.]+/g).map(Number);
    const inner = e.querySelector('div > div') || e;
    let back = inner; while (numbers(getComputedStyle(back).backgroundColor)[3] === 0) back = back.parentElement;
    const [a, b] = [light(numbers(getComputedStyle(inner).color).slice(0, 3)), light(numbers(getComputedStyle(back).backgroundColor).slice(0, 3))].sort((x, y) => x - y);
    return (b + .05)/(a + .05) }'''
