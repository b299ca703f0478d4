"Put a Colab badge and a hidden cell that installs the package there into every notebook. With --check: only say whether they are up to date."
import re, sys
from execnb.nbio import mk_cell, nb2str, read_nb
from nbdev.config import get_config
from pages import ROOT, notebooks

BADGE, INSTALL = 'colab-badge', 'colab-install'  # ids of the two cells
MARK = '[![Open In Colab]'
IMPORTED_AS = {'open_clip_torch': 'open_clip', 'grad-cam': 'pytorch_grad_cam'}  # packages whose module has another name

def packages(code):
    "Top-level names that lines of code import"
    lines = re.findall(r'^ *(?:try: )?(?:from (\S+) import|import (.+))', code, re.M)
    return {part.split()[0].split('.')[0] for one, several in lines for part in (one or several).split(',') if part.strip()}

def module(requirement):
    name = re.split('[<>=!~]', requirement)[0]
    return IMPORTED_AS.get(name, name.replace('-', '_'))

def extras(cfg): return {k.removesuffix('_requirements'): v.split() for k,v in cfg.d.items() if k.endswith('_requirements')}

def source(nb): return '\n'.join(c.source for c in nb.cells if c.cell_type=='code' and not ours(c))

def needs(code, pages, cfg):
    "What a page imports that does not come with the package: extras that it needs all of, and single requirements"
    methods = {m: other for other in pages for m in re.findall(r"^@method\('(\w+)'", other, re.M)}  # a page that uses a method needs what the method does
    imported = packages(code).union(*(packages(other) for m,other in methods.items() if re.search(rf"['\"]{m}['\"]", code)))
    left,found = imported-{module(r) for r in cfg.requirements.split()},[]
    for extra,reqs in extras(cfg).items():
        if (all_of := {module(r) for r in reqs})<=left: found.append(extra); left -= all_of
    return found,list({module(r): r for reqs in extras(cfg).values() for r in reqs if module(r) in left}.values())

def ours(cell): return cell.get('id') in (BADGE, INSTALL) or cell.source.startswith(MARK) or '[ -e /content ]' in cell.source

def badge(path, cfg):
    link = f'https://colab.research.google.com/github/{cfg.user}/{cfg.repo}/blob/{cfg.branch}/{path.relative_to(ROOT).as_posix()}'
    return f'{MARK}(https://colab.research.google.com/assets/colab-badge.svg)]({link})'

def install(code, found, plain, cfg):
    what = f"{cfg.lib_name}{'['+','.join(found)+']' if found else ''} @ git+{cfg.git_url}@{cfg.branch}"
    lines = ['#| hide', '#| eval: false', '! [ -e /content ] && pip install -Uqq '+' '.join(f'"{r}"' for r in [what, *plain])+'  # on Colab only']
    clone = f'! [ -e /content ] && git clone -q --depth 1 -b {cfg.branch} {cfg.git_url} /tmp/{cfg.repo}'
    beside = sorted(set(re.findall(r"""['"]\.\./(\w+)""", code)))  # folders that a page reads; a notebook on Colab lies in /content
    return '\n'.join(lines+[' && '.join([clone, *(f'ln -sfn /tmp/{cfg.repo}/{b} /{b}' for b in beside)])]*bool(beside))

def with_badge(path, pages, cfg):
    "The text of a notebook with both cells, under its title"
    nb = read_nb(path)
    cells,code = [c for c in nb.cells if not ours(c)],source(nb)
    title = next((i for i,c in enumerate(cells) if c.cell_type=='markdown' and c.source.startswith('# ')), None)
    if title is None: raise ValueError(f'{path.name} has no title: begin its first markdown cell with "# "')
    new = [mk_cell(badge(path, cfg), 'markdown', id=BADGE), mk_cell(install(code, *needs(code, pages, cfg), cfg), 'code', id=INSTALL)]
    new[1].execution_count = None
    nb.cells = [*cells[:title+1], *new, *cells[title+1:]]
    return nb2str(nb)

def main():
    cfg,pages = get_config(path=ROOT),[source(read_nb(p)) for p in notebooks()]
    stale = {p: text for p in notebooks() if (text := with_badge(p, pages, cfg))!=p.read_text(encoding='utf-8')}
    if '--check' in sys.argv:
        if stale: sys.exit(f"badge or install cell is not up to date (make export writes them): {' '.join(p.name for p in stale)}")
        return
    for p,text in stale.items(): p.write_text(text, encoding='utf-8')

if __name__=='__main__': main()
