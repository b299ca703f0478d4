"The built pages in a browser: figures with controls, without a kernel and without scripts. `--site _docs` tries what Quarto made."
import base64, subprocess, sys
from pathlib import Path
import pytest
from test_browser import browser  # a fixture

ROOT = Path(__file__).resolve().parents[1]
MUST = ['index', *(f'0{k}' for k in range(6)), '30', '31']  # the landing page, the rules, the assemblies of whole models

def operable(p): return '<libra-frames' in p.read_text(encoding='utf-8')
PAGES = sorted(p.relative_to(ROOT/'nbs').as_posix() for p in (ROOT/'nbs').rglob('*.ipynb') if operable(p))

@pytest.fixture(scope='module')
def site(request, tmp_path_factory):
    if given := request.config.getoption('--site'): return Path(given).resolve()
    out = tmp_path_factory.mktemp('site')
    subprocess.run([sys.executable, '-W', 'ignore', ROOT/'tools/site.py', '--preview', out, *PAGES], check=True, cwd=ROOT)
    return out

def address(site, path):
    stem = Path(path).stem
    name = stem.split('_', 1)[1] if stem[0].isdigit() else stem
    return (site/Path(path).with_name(f'{name}.html')).as_uri()

def test_every_page_that_must_have_one_has_a_figure_with_controls():
    assert all(any(Path(p).name.startswith(m) for p in PAGES) for m in MUST)

def look(figure): return figure.locator('img').get_attribute('src'), figure.locator('figcaption').inner_text()

def move(page, control):
    "Choose another option by the keyboard alone"
    kind = control.get_attribute('data-kind')
    one = control.locator('input:checked' if kind == 'buttons' else 'input, select').first
    one.focus()
    assert one.evaluate('e => e === document.activeElement')
    page.keyboard.press({'checkbox': 'Space', 'slider': 'ArrowRight' if one.get_attribute('max') != one.input_value() else 'ArrowLeft'}.get(kind, 'ArrowDown'))

@pytest.mark.parametrize('path', PAGES)
def test_controls_change_picture_and_sentence(site, browser, path):
    page, broken = browser.new_page(), []
    page.on('pageerror', lambda e: broken.append(str(e)))
    page.route('http*://**', lambda r: r.abort())  # nothing may be fetched
    page.goto(address(site, path), wait_until='domcontentloaded')
    figures = page.locator('libra-frames').all()
    assert figures
    for figure in figures:
        assert figure.locator('.controls').is_visible()
        assert figure.locator('img').get_attribute('alt') == figure.locator('figcaption').inner_text() != ''
        changed = []
        for control in figure.locator('[data-kind]').all():
            before = look(figure)
            move(page, control)
            after = look(figure)
            changed.append(before[0] != after[0])
            assert figure.locator('img').evaluate('i => i.decode().then(() => i.naturalWidth > 100)')
        assert any(changed) and sum(changed) >= len(changed) - 1  # a rule may change nothing for one choice of the others
    assert not broken
    page.close()

@pytest.mark.parametrize('path', PAGES)
def test_without_scripts_there_is_a_picture_and_no_dead_control(site, browser, path):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.route('http*://**', lambda r: r.abort())
    page.goto(address(site, path), wait_until='domcontentloaded')
    for figure in page.locator('libra-frames').all():
        src = figure.locator('img').get_attribute('src')
        assert base64.b64decode(src.split(',', 1)[1]).startswith(b'\x89PNG') and figure.locator('img').is_visible()
        assert not figure.locator('.controls').is_visible()
    context.close()

def test_no_page_is_wider_than_a_phone(site, browser):
    page = browser.new_page(viewport=dict(width=400, height=800))
    page.route('http*://**', lambda r: r.abort())
    for path in ('index.ipynb', '03_attention.ipynb'):
        page.goto(address(site, path), wait_until='domcontentloaded')
        for figure in page.locator('libra-frames').all(): assert figure.bounding_box()['width'] <= 400
    page.close()
