"Write README.md from nbs/index.ipynb (Quarto is not needed). With --check: only say whether it is up to date."
import os, posixpath, re, shutil, sys
from pathlib import Path
import nbformat
from execnb.nbio import nb2str
from nbconvert import MarkdownExporter
from nbdev.config import get_config
from nbdev.frontmatter import FrontmatterProc
from nbdev.process import NBProcessor
from nbdev.processors import clean_magics, hide_, hide_line, rm_export, rm_header_dash, strip_ansi
from traitlets.config import Config

ROOT = Path(__file__).resolve().parents[1]
FIGURES = 'index_files'  # where pictures go that cells of index.ipynb drew
SHOWN = 'text/markdown image/png image/svg+xml text/html text/latex text/plain'.split()  # what GitHub shows, best first

def relink(text, nbs):
    "Links in a notebook start at its folder, links in the README at the top: `images/a.png` becomes `nbs/images/a.png`"
    def sub(m):
        path = posixpath.normpath(f'{nbs.name}/{m[2]}')
        return m[1]+path if (ROOT/path).exists() else m[0]
    text = re.sub(r'(\]\(|\b(?:src|href)=")(?!\w+:|#|/)([^)#"\s]+)', sub, text)
    return re.sub(r'(!\[[^\]]*\]\([^)]*\))\{[^}]*\}', r'\1', text)  # Quarto's picture attributes mean nothing to GitHub

def options(cell):
    "Do with a cell what its Quarto options `include`, `echo` and `output` ask for; None drops the cell"
    opts = {k.rstrip(':'): v[0].lower() for k,v in cell.directives_.items() if k.endswith(':') and v}
    if opts.get('include')=='false': return
    if opts.get('echo')=='false': cell.metadata['transient'] = {'remove_source': True}
    if opts.get('output')=='false': cell.outputs = []
    cell.source = re.sub(r'^#\|.*\n?', '', cell.source, flags=re.M)
    return cell

def badges(cfg):
    tests = f'{cfg.git_url}/actions/workflows/test.yaml'
    return (f'[![tests]({tests}/badge.svg?branch={cfg.branch})]({tests}) · [documentation]({cfg.doc_host}{cfg.doc_baseurl}) · '
            f'[source]({cfg.git_url}) · [changes](CHANGELOG.md) · [contributing](CONTRIBUTING.md) · [Apache-2.0](LICENSE)')

def render(cfg):
    "What belongs to the README: {path: bytes}, README.md itself and the figures that it shows"
    nb = NBProcessor(cfg.nbs_path/cfg.readme_nb, process=True, procs=[
        FrontmatterProc, strip_ansi, hide_line, rm_header_dash, rm_export, clean_magics, hide_]).nb
    meta = nb.frontmatter_
    cells = [c for c in nb.cells if c.cell_type!='raw']
    for c in cells:
        if c.cell_type=='markdown': c.source = relink(c.source, cfg.nbs_path)
    nb.cells = [c for c in cells if c.cell_type!='code' or options(c)]
    nb.metadata['language_info'] = {'name': 'python'}
    alts = iter(re.findall(r'^#\| fig-alt: "(.*)"$', '\n'.join(c.source for c in nbformat.read(cfg.nbs_path/cfg.readme_nb, 4).cells), re.M))
    exporter = MarkdownExporter(config=Config(NbConvertBase={'display_data_priority': SHOWN}))
    body,res = exporter.from_notebook_node(nbformat.reads(nb2str(nb), as_version=4),
                                           resources={'unique_key': 'index', 'output_files_dir': FIGURES})
    for junk in [r'^:::.*\n', r'(?s)<style.*?</style>\s*', r'[ \t]+$', r'\n+(?=\n\n)']: body = re.sub('(?m)'+junk, '', body)
    body = re.sub(r'!\[(?:png|svg)\]', lambda m: f'![{next(alts, "figure")}]', body)
    text = '\n\n'.join([f"# {meta.get('title', cfg.title)}", f'<!-- Made from {cfg.nbs_path.name}/{cfg.readme_nb}: edit there, then `make export` -->',
                        badges(cfg), meta.get('description', cfg.description), body.strip()])+'\n'
    return {'README.md': text.encode(), **dict(res.get('outputs', {}))}

def on_disk(): return {p.relative_to(ROOT).as_posix(): p.read_bytes() for p in [ROOT/'README.md', *(ROOT/FIGURES).glob('*')] if p.exists()}

def main():
    os.chdir(ROOT)
    new,old = render(get_config()),on_disk()
    if '--check' in sys.argv:
        if stale := sorted(k for k in new.keys()|old.keys() if new.get(k)!=old.get(k)):
            sys.exit(f"not what index.ipynb gives (make export writes it): {' '.join(stale)}")
        return
    shutil.rmtree(ROOT/FIGURES, ignore_errors=True)
    for k,v in new.items():
        (ROOT/k).parent.mkdir(exist_ok=True)
        (ROOT/k).write_bytes(v)

if __name__=='__main__': main()
