"Where the notebooks are"
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT/'nbs'

def files(pattern='*'):
    "Files under nbs/, but for checkpoints and drafts (a . or _ in front)"
    return sorted(p for p in NBS.rglob(pattern) if p.is_file() and not any(o[0] in '._' for o in p.relative_to(NBS).parts))

def notebooks(): return files('*.ipynb')
