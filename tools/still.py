"`still.py [--check] [NAME...]`: saved notebooks keep the picture of a widget, never the widget itself, which nothing answers for once its kernel is gone"
import json, sys
from pages import notebooks

LIVE = 'application/vnd.jupyter.widget-'

def still(nb):
    "Drop live views and their state; returns whether there were any"
    bundles = [o['data'] for c in nb['cells'] for o in c.get('outputs', []) if 'data' in o]
    found = [(b, k) for b in bundles for k in b if k.startswith(LIVE)]
    for b, k in found: del b[k]
    return bool(nb['metadata'].pop('widgets', None)) or bool(found)

def main(check='--check' in sys.argv):
    only, bad = [a for a in sys.argv[1:] if a != '--check'], []
    for p in [p for p in notebooks() if not only or p.stem in only]:
        nb = json.loads(p.read_text(encoding='utf-8'))
        if not still(nb): continue
        bad.append(p.name)
        if not check: p.write_text(json.dumps(nb, sort_keys=True, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')
    if bad and check: print('widgets are stored in these: run make export:', *bad)
    sys.exit(bool(bad and check))

if __name__ == '__main__': main()
