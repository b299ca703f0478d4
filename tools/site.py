"""The pages of the site, for Quarto and without it. Notebooks are processed by nbdev, as for its own site; the API reference is
collected from what that shows; pandoc reads the pages, as Quarto lets it."""
import argparse, base64, html, os, re, shutil, subprocess, sys, tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from urllib.parse import unquote
import pypandoc, yaml
from bs4 import BeautifulSoup
from execnb.nbio import read_nb, write_nb
from nbdev.config import get_config
from nbdev.processors import FilterDefaults
from nbdev.quarto import refresh_quarto_yml
from nbdev.serve_drv import main as process
import api
from pages import NBS, ROOT, files, notebooks

MOST = 1_000_000  # bytes of a page with its pictures
SHOWN = 'text/html text/markdown image/svg+xml image/png image/jpeg text/plain'.split()  # what Quarto shows, best first
FOREIGN = re.compile(rf'(?<![\w.:/])(?:/(?:home|root|Users|tmp|private|mnt|srv|{re.escape(ROOT.parts[1])})/|[A-Z]:\\)[\w.\\/-]+')

def sidebar():
    "The pages in reading order: {path in nbs/: (section, text or None)}"
    found = {}
    def walk(items, section):
        for o in items:
            if isinstance(o, str): found[o] = section, None
            elif 'href' in o: found[o['href']] = section, o['text']
            else: walk(o['contents'], o['section'])
    walk(yaml.safe_load((ROOT/'_quarto.yml').read_text(encoding='utf-8'))['website']['sidebar']['contents'], '')
    return found

class Page:
    "Markdown as pandoc reads it, its front matter and its pictures"
    def __init__(self, path, front, text, cells=()):
        self.path, self.front, self.text, self.cells, self.pictures = path, front, text, cells, {}
        self.out = str(Path(path).with_name(front.get('output-file') or Path(path).stem + '.html'))

    @cached_property
    def html(self):
        "Parsed HTML, and what pandoc complained about"
        p = subprocess.run([pypandoc.get_pandoc_path(), '-f', 'markdown-implicit_figures', '-t', 'html5', '--mathml', '--wrap=none'], input=self.text, capture_output=True, text=True, encoding='utf-8')
        return BeautifulSoup(p.stdout, 'html.parser'), p.stderr.strip()

    @cached_property
    def ids(self): return {o['id'] for o in self.html[0].find_all(id=True)}

    @property
    def size(self): return len(str(self.html[0])) + sum(map(len, self.pictures.values()))

class NotebookPage(Page):
    "A notebook as nbdev processes it; `shown` holds the documentation of the names it exports"
    def __init__(self, path, folder, home):
        self.file = folder/path
        self.file.parent.mkdir(parents=True, exist_ok=True)
        process((NBS/path, self.file, FilterDefaults))
        self.nb, self.source, self.home = read_nb(self.file), read_nb(NBS/path), home
        front = yaml.safe_load(self.nb.cells[0].source.strip().strip('-'))
        self.shown = {m[1]: ''.join(o.data['text/markdown']) for c in self.nb.cells if (m := re.search(r'^show_doc\((\w+)\)', c.source, re.M)) for o in c.outputs if 'data' in o}
        super().__init__(path, front, '', self.nb.cells)

    def link(self, pages):
        "nbdev links every name that it finds in the package, by the address of the published site: keep those that have a place, and make them relative"
        up, places = '../'*self.path.count('/'), {p.out: {n.lower() for n in p.shown} for p in pages}
        def near(m):
            if m[3] in places.get(m[2], ()) or not m[3]: return f'[{m[1]}]({up}{m[2]}{"#" + m[3] if m[3] else ""})'
            return m[1]
        address = re.compile(rf'\[([^\]]*)\]\({re.escape(self.home)}([^)#]*)#?([^)]*)\)')
        def relink(text):
            parts = re.split(r'(?ms)(^```.*?^```$)', text)  # nbdev links names in code too, where a link is not read
            parts = [re.sub(r'(?m)^### .*<locals>\\?\.', '### ', t) for t in parts]
            parts = [re.sub(r'(?m)^( {4}\w+(?::\w+)?=)\{<.*\}(?=[,)]| *#)', r'\1{…}', t) if t.startswith('```') else t for t in parts]  # a table of functions, with their addresses
            return ''.join(address.sub(r'\1', t) if t.startswith('```') else address.sub(near, t) for t in parts)
        for c in self.cells:
            if c.cell_type == 'markdown': c.source = relink(c.source)
            for o in c.get('outputs', []):
                if 'text/markdown' in o.get('data', {}): o.data['text/markdown'] = relink(''.join(o.data['text/markdown']))
        self.shown = {k: relink(v) for k,v in self.shown.items()}
        write_nb(self.nb, self.file)
        self.text = '\n\n'.join(filter(None, map(self.cell, self.cells[1:])))

    def cell(self, c):
        if c.cell_type != 'code': return c.source
        asked = dict(re.findall(r'^#\| *([\w-]+): *(.*?) *$', c.source, re.M))
        if asked.get('include') == 'false': return
        source = re.sub(r'^#\|.*\n?', '', c.source, flags=re.M).strip()
        code = f'`````python\n{source}\n`````' if source and asked.get('echo') != 'false' else ''
        if asked.get('code-fold') == 'true' and code: code = f'<details><summary>Code</summary>\n\n{code}\n\n</details>'
        outputs = [] if asked.get('output') == 'false' else [self.output(o, asked) for o in c.get('outputs', [])]
        return '\n\n'.join([code, *filter(None, outputs)])

    def output(self, o, asked):
        if o.output_type in ('stream', 'error'): return f'`````{{.output}}\n{"".join(o.text) if "text" in o else o.evalue}\n`````'
        kind = next((k for k in SHOWN if k in o.data), None)
        data = ''.join(o.data[kind]) if kind else ''
        if kind == 'text/html': return f'`````{{=html}}\n{data}\n`````'
        if kind == 'text/markdown' or not kind: return data
        if kind == 'text/plain': return data if asked.get('output') == 'asis' else f'`````{{.output}}\n{data}\n`````'
        name = f'{Path(self.path).stem}_files/{len(self.pictures)}.{kind[6:9]}'
        self.pictures[name] = data.encode() if 'svg' in kind else base64.b64decode(data)
        return f'![{asked.get("fig-alt", "").strip(chr(34))}]({name})'

    @property
    def module(self): return next((m[1] for c in self.source.cells if (m := re.match(r'#\| default_exp (\w+)', c.source))), None)

    @property
    def paper(self): return next(iter(re.findall(r'(?s)\*\*Papers?:\*\*.*', self.cells[-1].source)), '')

class Site:
    "All pages, or those asked for, processed into a folder"
    def __init__(self, folder, paths=None):
        self.cfg, listed = get_config(path=ROOT), sidebar()
        self.sections, self.texts = ({k: v[i] for k,v in listed.items()} for i in (0, 1))
        self.home, self.pages, self.failed = f'{self.cfg.doc_host}{self.cfg.doc_baseurl}/', {}, {}
        for path in [p for p in paths or self.sections if p.endswith('.ipynb')]:
            try: self.pages[path] = NotebookPage(path, folder, self.home)
            except Exception as e: self.failed[path] = ['nbdev cannot process it (imports belong in cells of their own): ' + str(e)]
        for p in self.pages.values(): p.link(self.pages.values())
        if not paths: self.collect(folder)
        with ThreadPoolExecutor(os.cpu_count()) as pool: list(pool.map(lambda p: p.html, self.pages.values()))
        self.by_out = {p.out: p for p in self.pages.values()}

    def collect(self, folder):
        "The API reference, a page for each section of the sidebar: api/the-rules.qmd for The rules"
        pages, self.pages = self.pages, {}
        for path, section in self.sections.items():
            if path.endswith('.ipynb'):
                if path in pages: self.pages[path] = pages[path]
                continue
            of = [p for p in pages.values() if self.sections[p.path].lower().replace(' ', '-') == Path(path).stem and p.module]
            front = dict(title=f'API: {self.sections[of[0].path]}', description='Every public name: ' + ', '.join(p.module for p in of))
            front['repo-actions'] = False  # there is no such file to show
            text = '\n\n'.join(api.module(p.module, p.front['title'], p.front.get('description', ''), f'../{p.out}', p.shown, p.paper) for p in of)
            text = re.sub(r'\]\((?!\w+:|\.\./|#)', '](../', text)
            self.pages[path] = Page(path, front, text)
            (folder/path).parent.mkdir(exist_ok=True)
            (folder/path).write_text(f'---\n{yaml.safe_dump(front)}---\n\n{text}\n', encoding='utf-8')

    def resolve(self, page, href):
        "What a link leads to: (Page, fragment), (None, '') for a page that is not there, a Path, or None for the rest of the web"
        if re.match(r'\w+:', href):
            m = re.match(rf'{re.escape(self.cfg.git_url)}/(?:blob|tree)/{self.cfg.branch}/([^#?]+)', href)
            return ROOT/unquote(m[1]) if m else None
        path, _, fragment = unquote(href).partition('#')
        if not path: return page, fragment
        path = os.path.normpath(os.path.join(os.path.dirname(page.path), path))
        if path.endswith(('.ipynb', '.qmd')): return self.pages.get(path), fragment
        if path.endswith('.html'): return self.by_out.get(path), fragment
        return NBS/path

    def wrong_links(self, page):
        for a in page.html[0].find_all(['a', 'img']):
            href = a.get('href') or a.get('src') or ''
            if not href or href.startswith('data:') or href in page.pictures: continue
            where = self.resolve(page, href)
            if isinstance(where, Path) and not where.exists(): yield f'leads nowhere: {href}'
            if isinstance(where, tuple):
                if where[0] is None: yield f'leads to no page of the site: {href}'
                elif where[1] and where[1] not in where[0].ids: yield f'leads to no place on that page: {href}'

    def wrong(self, page):
        "Everything that is wrong with a page, in sentences"
        yield from self.wrong_links(page)
        if not page.front.get('title'): yield 'has no title'
        if not (d := page.front.get('description')): yield 'has no description: put a line "> what it is" under its title'
        elif len(str(d)) > 200 and page.cells: yield f'its description has {len(str(d))} characters'
        if page.cells:
            yield from wrong_outputs(page.source)
            first = next(c.source for c in page.source.cells if c.cell_type == 'markdown')
            if len([l for l in first.splitlines() if l.strip()]) > 2: yield 'says more in the cell of its title than the title and one line after ">": nbdev drops the rest, so put it in a cell of its own'
        if complaint := page.html[1]: yield f'pandoc: {complaint}'
        for t in page.html[0].find_all(string=re.compile(r'^\s*:::|\$\$')):
            if not t.find_parent(['code', 'pre', 'script', 'style', 'annotation']): yield f'markdown that pandoc does not understand: {t.strip()[:80]}'
        if page.size > MOST: yield f'is {page.size/1e6:.2f} MB, more than {MOST/1e6:.0f}'

    def complaints(self):
        found = dict(self.failed)
        for path, p in self.pages.items():
            if w := list(dict.fromkeys(self.wrong(p))): found[path] = w
        there = {p.relative_to(NBS).as_posix() for p in notebooks()}
        listed = {p for p in self.sections if p.endswith('.ipynb')}
        if there != listed: found['_quarto.yml'] = [f'does not list {p}' for p in sorted(there-listed)] + [f'lists {p}, which is not there' for p in sorted(listed-there)]
        if w := list(wrong_readme()): found['README.md'] = w
        return found

    def preview(self, out):
        "Plain HTML of all pages"
        pages = list(self.pages.values())
        for k, page in enumerate(pages):
            target, up = out/page.out, '../'*page.out.count('/')
            target.parent.mkdir(parents=True, exist_ok=True)
            for name, data in page.pictures.items():
                (target.parent/name).parent.mkdir(exist_ok=True)
                (target.parent/name).write_bytes(data)
            soup = BeautifulSoup(str(page.html[0]), 'html.parser')
            for a in soup.find_all('a', href=True):
                if isinstance(where := self.resolve(page, a['href']), tuple) and where[0]: a['href'] = (up + where[0].out if where[0] is not page else '') + ('#' + where[1])*bool(where[1])
            steps = ''.join(f'<a href="{up}{pages[j].out}">{mark} {html.escape(str(pages[j].front["title"]))}</a>' for j, mark in ((k-1, '←'), (k+1, '→')) if 0 <= j < len(pages))
            title = html.escape(str(page.front['title']))
            target.write_text(f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title><style>{LOOK}\n{(NBS/"styles.css").read_text()}</style></head>'
                f'<body><nav>{self.menu(page, up)}</nav><main><h1>{title}</h1><p class="lead">{html.escape(str(page.front.get("description", "")))}</p>{soup}<p class="steps">{steps}</p></main></body></html>', encoding='utf-8')
        return len(pages)

    def menu(self, here, up):
        lines, section = [], ''
        for path, page in self.pages.items():
            if self.sections[path] != section: lines.append(f'<b>{(section := self.sections[path])}</b>')
            lines.append(f'<a{" class=here" if page is here else ""} href="{up}{page.out}">{html.escape(self.texts[path] or str(page.front["title"]))}</a>')
        return ''.join(lines)

def wrong_outputs(nb):
    outputs = [o for c in nb.cells for o in c.get('outputs', [])]
    if not outputs: yield 'has no stored outputs: run it before you commit it'
    for o in outputs:
        texts = [''.join(o.get('text', ''))] + [''.join(v) for k,v in o.get('data', {}).items() if k.startswith('text/')]
        if o.output_type == 'error' or any('Traceback (most recent call last)' in t for t in texts): yield f'shows an error: {o.get("evalue", texts[0][-80:])}'
        if o.get('name') == 'stderr': yield f'shows what went to stderr: {texts[0][:120]!r}'
        for t in texts:
            if m := FOREIGN.search(re.sub(r'[\w+/=]{200,}', '', t)): yield f'shows a path of the machine that ran it: {m[0]}'

def wrong_readme():
    for href in re.findall(r'\]\(([^)\s]+)\)', (ROOT/'README.md').read_text(encoding='utf-8')):
        if not re.match(r'\w+:|#', href) and not (ROOT/unquote(href.partition('#')[0])).exists(): yield f'leads nowhere: {href}'

LOOK = '''body { font: 16px/1.55 system-ui, sans-serif; margin: 0; display: flex; color: #222 }
nav { width: 15rem; flex: none; padding: 1rem; border-right: 1px solid #ddd; font-size: .85rem } nav a, nav b { display: block; padding: .1rem 0; text-decoration: none } nav b { margin-top: .8rem } .here { font-weight: bold }
main { max-width: 50rem; padding: 1rem 2rem; min-width: 0 } .lead { font-style: italic; color: #555 } .steps { display: flex; justify-content: space-between; border-top: 1px solid #ddd; padding-top: 1rem }
pre { background: #f6f6f6; padding: .5rem .8rem; white-space: pre-wrap } pre.output { background: none; border-left: 2px solid #5a9bd4 } img, table { max-width: 100% } td, th { padding: .15rem .5rem; border-bottom: 1px solid #eee; vertical-align: top }
[class*=callout] { border-left: 4px solid #5a9bd4; padding: .1rem 1rem; background: #f4f8fc } blockquote { border-left: 3px solid #ccc; margin-left: 0; padding-left: 1rem }
@media (max-width: 700px) { body { display: block } nav { display: none } main { padding: 1rem } }'''

def for_quarto():
    "Everything that Quarto needs, in _proc/"
    proc = ROOT/'_proc'
    shutil.rmtree(proc, ignore_errors=True)
    refresh_quarto_yml()
    site = Site(proc)
    for p in [NBS/'_quarto.yml', *(p for p in files() if p.suffix != '.ipynb')]:
        (proc/p.relative_to(NBS)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(p, proc/p.relative_to(NBS))
    if site.failed: sys.exit('\n'.join(f'{k}: {v[0]}' for k,v in site.failed.items()))

def wrong_built(out):
    "Links that lead nowhere in HTML on disk, and pages that are too large with their pictures"
    soups = {p: BeautifulSoup(p.read_text(encoding='utf-8'), 'html.parser') for p in sorted(out.rglob('*.html')) if 'site_libs' not in p.parts}
    ids = {p: {o['id'] for o in s.find_all(id=True)} | {o['name'] for o in s.find_all('a', attrs={'name': True})} for p,s in soups.items()}
    for page, soup in soups.items():
        size = page.stat().st_size
        for a in soup.find_all(['a', 'img']):
            href = unquote(a.get('href') or a.get('src') or '')
            if not href or re.match(r'\w+:|//', href): continue
            path, _, fragment = href.partition('#')
            to = (page.parent/path.split('?')[0]).resolve() if path else page
            if to.is_dir(): to /= 'index.html'
            if not to.exists(): yield f'{page.relative_to(out)} leads nowhere: {href}'
            elif fragment and to in ids and fragment not in ids[to] and a.get('role') not in ('button', 'tab'): yield f'{page.relative_to(out)} leads to no place on that page: {href}'
            elif a.name == 'img': size += to.stat().st_size
        if size > MOST: yield f'{page.relative_to(out)} is {size/1e6:.2f} MB, more than {MOST/1e6:.0f}'

def main():
    ask = argparse.ArgumentParser(description=__doc__)
    what = ask.add_mutually_exclusive_group(required=True)
    what.add_argument('--check', action='store_true', help='say what is wrong with the pages')
    what.add_argument('--quarto', action='store_true', help='write the pages to _proc/, for Quarto to render')
    what.add_argument('--preview', type=lambda p: Path(p).resolve(), metavar='OUT', help='write them as plain HTML, to read and to test where there is no Quarto')
    what.add_argument('--built', type=lambda p: Path(p).resolve(), metavar='DIR', help='say what is wrong with the links and sizes of what Quarto made')
    ask.add_argument('pages', nargs='*', help='only these, such as 00_core.ipynb (with --preview)')
    args = ask.parse_args()
    os.chdir(ROOT)
    if args.quarto: return for_quarto()
    if args.built: sys.exit('\n'.join(wrong_built(args.built)) or None)
    with tempfile.TemporaryDirectory() as folder:
        site = Site(Path(folder), args.pages)
        if args.preview: print(f'{site.preview(args.preview)} pages: open {args.preview}/index.html')
        found = site.failed if args.preview else site.complaints()
        if found: sys.exit('\n'.join(f'{k}\n  ' + '\n  '.join(w) for k,w in found.items()))

if __name__=='__main__': main()
