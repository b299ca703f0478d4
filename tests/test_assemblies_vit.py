"What the assemblies of whole image models need besides their cells"
import json, re
from configparser import ConfigParser
from fnmatch import fnmatch
from importlib.resources import files
from pathlib import Path

import pytest, timm
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
PAGES = ['30_vit', '31_mixer']

def source(page): return '\n'.join(''.join(c['source']) for c in json.loads((ROOT/f'nbs/{page}.ipynb').read_text(encoding='utf-8'))['cells'])

def test_photograph():
    photo = Image.open(files('libragrad_nb')/'data/cat.jpg')
    assert photo.mode == 'RGB' and photo.size == (256, 256)

def test_all_data_are_packaged():
    settings = ConfigParser(interpolation=None)
    settings.read(ROOT/'settings.ini', encoding='utf-8')
    patterns = settings['DEFAULT']['package_data'].split()
    here = [f'{folder}/{f.name}' for folder in ('data', 'weights') for f in (ROOT/'libragrad_nb'/folder).iterdir() if f.is_file()]
    assert 'data/cat.jpg' in here
    assert [f for f in here if not any(fnmatch(f, p) for p in patterns)] == []

@pytest.mark.parametrize('page', PAGES)
def test_pretrained_names_exist(page):
    names = re.findall(r"# or '(\S+)'", source(page))
    assert names and set(names) <= set(timm.list_pretrained())
