"Image files of every kind, whole and broken; lists of images as people write them"
import functools, io, math, resource, signal, struct, tempfile, warnings, zlib
from pathlib import Path
import numpy as np
import pytest
import timm
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image, ImageOps, features
from libragrad_nb.examples import ImageFiles, _csv, _draw, _numbers, _rows
from libragrad_nb.images import read_image

WHITE, RED = (255, 255, 255), (255, 0, 0)

def file(image, kind, **options):
    "The bytes of a file"
    out = io.BytesIO(); image.save(out, kind, **options)
    return out.getvalue()

def pixels(data): return np.asarray(read_image(data))

def photo(h=24, w=36):
    "Smooth and not symmetric"
    y, x = np.mgrid[:h, :w]
    return Image.fromarray(np.stack([255*x/w, 255*y/h, 255*(x > w/2)*(y < h/2)], -1).astype(np.uint8))

def chunk(kind, data): return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
def png(w, h, data=b'', bits=8, colour=2):
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', w, h, bits, colour, 0, 0, 0)) + chunk(b'IDAT', zlib.compress(data)) + chunk(b'IEND', b'')

# what is read

@pytest.mark.parametrize('kind, options', [('PNG', {}), ('BMP', {}), ('TIFF', {}), ('PPM', {}), ('WEBP', dict(lossless=True)), ('TIFF', dict(compression='tiff_lzw'))])
def test_lossless_files_keep_every_pixel(kind, options): assert np.array_equal(pixels(file(photo(), kind, **options)), photo())

@pytest.mark.parametrize('kind', ['JPEG', 'WEBP', 'JPEG2000', 'AVIF'])
def test_lossy_files_look_the_same(kind):
    if kind == 'AVIF' and not features.check('avif'): pytest.skip('this Pillow has no AVIF')
    assert np.abs(pixels(file(photo(96, 96), kind)).astype(int) - np.asarray(photo(96, 96)).astype(int)).mean() < 6

def test_paths_bytes_and_images_say_the_same(tmp_path):
    photo().save(tmp_path/'a.png')
    for given in (tmp_path/'a.png', str(tmp_path/'a.png'), (tmp_path/'a.png').read_bytes(), photo()):
        found = read_image(given)
        assert found.mode == 'RGB' and np.array_equal(found, photo())

def test_an_image_of_the_caller_stays_open_and_as_it_is(tmp_path):
    turned(6).save(tmp_path/'a.png', exif=turned(6).getexif())
    with Image.open(tmp_path/'a.png') as image:
        for _ in range(2): assert np.array_equal(read_image(image), photo())
        assert image.getexif()[274] == 6

@pytest.mark.parametrize('mode', ['1', 'L', 'P'])
def test_one_channel(mode):
    image = photo().convert(mode)
    assert np.array_equal(pixels(file(image, 'PNG')), image.convert('RGB'))

def test_cmyk():
    ink = Image.new('CMYK', (8, 8), (0, 255, 255, 0)) # magenta and yellow are red
    for kind in ('JPEG', 'TIFF'): assert np.abs(pixels(file(ink, kind)).astype(int) - RED).max() <= 2

def test_lab():
    "Some versions of Pillow know how, the others say that they do not"
    try: found = pixels(file(Image.new('LAB', (4, 4), (128, 128, 128)), 'TIFF')) # half as bright as white, to the eye
    except ValueError as e: assert 'LAB' in str(e)
    else: assert np.abs(found.astype(int) - 119).max() <= 2

ramp = np.linspace(0, 65535, 32*32).reshape(32, 32).astype(np.uint16)

@pytest.mark.parametrize('kind', ['PNG', 'TIFF', 'PPM', 'JPEG2000'])
def test_sixteen_bits_are_scaled(kind):
    data = b'P5 32 32 65535\n' + ramp.astype('>u2').tobytes() if kind == 'PPM' else file(Image.fromarray(ramp), kind)
    found = pixels(data)
    assert np.array_equal(found[..., 0], np.round(ramp/257).astype(np.uint8)) and (found == found[..., :1]).all()

def tiff(values, bits, white_is_zero=False, order='<'):
    "A bare TIFF of one strip, grey"
    data = values.astype(f'{order}u2').tobytes() if bits == 16 else pack12(values)
    tags = [(256, 4, values.shape[1]), (257, 4, values.shape[0]), (258, 3, bits), (259, 3, 1), (262, 3, 0 if white_is_zero else 1),
            (273, 4, 8), (277, 3, 1), (278, 4, values.shape[0]), (279, 4, len(data))]
    def entry(tag, kind, value): return struct.pack(f'{order}HHI', tag, kind, 1) + (struct.pack(f'{order}HH', value, 0) if kind == 3 else struct.pack(f'{order}I', value))
    head = (b'II' if order == '<' else b'MM') + struct.pack(f'{order}HI', 42, 8 + len(data))
    return head + data + struct.pack(f'{order}H', len(tags)) + b''.join(entry(*t) for t in tags) + bytes(4)

def pack12(values): # two pixels in three bytes
    a, b = values.reshape(-1, 2).T.astype(int)
    return np.stack([a >> 4, (a & 15) << 4 | b >> 8, b & 255], -1).astype(np.uint8).tobytes()

@pytest.mark.parametrize('options', [dict(bits=16), dict(bits=16, order='>'), dict(bits=16, white_is_zero=True), dict(bits=12)])
def test_scientific_tiffs(options):
    top = 2**options['bits'] - 1
    values = np.round(ramp/65535*top).astype(int)
    expected = np.round(values*255/top)
    found = pixels(tiff(values, **options))[..., 0].astype(int)
    assert np.abs(found - (255 - expected if options.get('white_is_zero') else expected)).max() <= 1

@pytest.mark.parametrize('image', [Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)), Image.fromarray(np.arange(64, dtype=np.int32).reshape(8, 8))])
def test_32_bits_are_refused(image):
    with pytest.raises(ValueError, match='32 bits.*save them with 8 or 16 bits'): read_image(file(image, 'TIFF'))

# transparency

def test_transparency_goes_onto_white():
    half = np.zeros((4, 4, 4), np.uint8); half[:, :2] = (255, 0, 0, 255); half[0, 0, 3] = 51
    for kind in ('PNG', 'TIFF', 'WEBP'):
        found = pixels(file(Image.fromarray(half), kind, **({'lossless': True, 'exact': True} if kind == 'WEBP' else {})))
        assert (found[:, 2:] == 255).all() and (found[1:, :2] == RED).all() and np.abs(found[0, 0].astype(int) - (255, 204, 204)).max() <= 1

def test_grey_with_alpha():
    image = Image.merge('LA', [Image.new('L', (4, 4), 100), Image.fromarray(np.eye(4, dtype=np.uint8)*255)])
    assert np.array_equal(pixels(file(image, 'PNG'))[..., 0], np.where(np.eye(4), 100, 255))

@pytest.mark.parametrize('kind', ['PNG', 'GIF'])
def test_a_transparent_colour_of_a_palette(kind):
    image = Image.new('P', (4, 4), 1); image.putpalette([0, 0, 255, 255, 0, 0]); image.putpixel((0, 0), 0)
    found = pixels(file(image, kind, transparency=0))
    assert tuple(found[0, 0]) == WHITE and (found[1:] == RED).all()

def test_a_palette_with_an_alpha_for_each_colour():
    image = Image.new('P', (4, 4), 1); image.putpalette([0, 0, 255, 255, 0, 0]); image.putpixel((0, 0), 0)
    found = pixels(file(image, 'PNG', transparency=bytes([0, 51])))
    assert tuple(found[0, 0]) == WHITE and np.abs(found[1, 1].astype(int) - (255, 204, 204)).max() <= 1

def test_a_transparent_colour_without_a_palette():
    grey = Image.new('L', (4, 4), 10); grey.putpixel((0, 0), 77)
    colours = Image.new('RGB', (4, 4), RED); colours.putpixel((0, 0), (1, 2, 3))
    deep = np.full((4, 4), 10*257, np.uint16); deep[0, 0] = 4321
    for image, clear, rest in ((grey, 77, 10), (colours, (1, 2, 3), RED)):
        found = pixels(file(image, 'PNG', transparency=clear))
        assert tuple(found[0, 0]) == WHITE and (found[1:] == rest).all()
    found = pixels(png_with(Image.fromarray(deep), b'tRNS', struct.pack('>H', 4321)))
    assert tuple(found[0, 0]) == WHITE and (found[1:] == 10).all()

def png_with(image, kind, data):
    "A PNG with one more chunk in front of the pixels"
    whole = file(image, 'PNG'); at = whole.index(b'IDAT') - 4
    return whole[:at] + chunk(kind, data) + whole[at:]

# which way up

def turned(orientation):
    "The photo as a camera stores it, with a note how to turn it"
    back = {2: 'FLIP_LEFT_RIGHT', 3: 'ROTATE_180', 4: 'FLIP_TOP_BOTTOM', 5: 'TRANSPOSE', 6: 'ROTATE_90', 7: 'TRANSVERSE', 8: 'ROTATE_270'}
    image = photo().transpose(Image.Transpose[back[orientation]]) if orientation > 1 else photo()
    image.getexif()[274] = orientation
    return image

@pytest.mark.parametrize('orientation', range(1, 9))
@pytest.mark.parametrize('kind', ['PNG', 'TIFF', 'WEBP', 'JPEG'])
def test_photographs_are_upright(kind, orientation):
    image = turned(orientation)
    exact = dict(lossless=True) if kind == 'WEBP' else dict(quality=100, subsampling=0) if kind == 'JPEG' else {}
    data = file(image, kind, exif=image.getexif(), **exact)
    found = pixels(data)
    assert found.shape == (24, 36, 3) and np.abs(found.astype(int) - np.asarray(photo()).astype(int)).mean() < 3
    assert np.array_equal(found, ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert('RGB'))
    assert np.array_equal(read_image(read_image(data)), found) # and not turned again

@pytest.mark.parametrize('exif', [b'Exif\0\0nonsense', b'Exif\0\0II*\0\xff\xff\xff\xff', b'Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x63\0\0\0'])
def test_notes_that_nobody_can_read_turn_nothing(exif):
    assert np.abs(pixels(file(photo(), 'JPEG', exif=exif, quality=100, subsampling=0)).astype(int) - np.asarray(photo()).astype(int)).mean() < 3

def test_a_mask_belongs_to_the_upright_picture(tmp_path):
    "Bright square and mask agree, though the file lies on its side"
    folder = _draw(tmp_path/'photos', classes=('3',), each=1)
    upright = Image.open(folder/'3/0.png')
    lying = upright.transpose(Image.Transpose.ROTATE_90); lying.getexif()[274] = 6
    lying.save(folder/'3/0.png', exif=lying.getexif())
    model = timm.create_model('test_vit').eval()
    files = ImageFiles(folder, model); e = files[:1]
    bright = e.inputs[0].mean(0) > .5*e.inputs[0].mean(0).amax()
    assert not files.skipped and (bright == e.masks[0]).float().mean() > .9

@pytest.mark.parametrize('mode', ['1', 'L', 'P', 'RGB', 'RGBA', 'LA'])
def test_masks_of_all_modes(tmp_path, mode):
    array = np.zeros((6, 6), np.uint8); array[2:4, 1:5] = 255
    Image.fromarray(array).convert(mode).save(tmp_path/'m.png')
    assert np.array_equal(_numbers(tmp_path/'m.png') > 0, array > 0)

# many frames

@pytest.mark.parametrize('kind', ['GIF', 'WEBP', 'TIFF', 'PNG'])
def test_the_first_frame(kind):
    frames = [Image.new('RGB', (16, 16), c) for c in (RED, (0, 255, 0), (0, 0, 255))]
    data = file(frames[0], kind, save_all=True, append_images=frames[1:], **(dict(duration=100) if kind != 'TIFF' else {}), **(dict(lossless=True) if kind == 'WEBP' else {}))
    assert Image.open(io.BytesIO(data)).n_frames == 3 and (pixels(data) == RED).all()

# what is refused

bomb = png(100_000, 100_000)
large = png(12_000, 12_000) # Pillow only warns of this one

@pytest.mark.parametrize('data, says', [
    (b'', 'a file of 0 bytes is no image'), (b'not an image', 'is no image'), (b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n', 'is no image'),
    (file(photo(), 'PNG')[:80], 'damaged'), (file(photo(200, 200), 'JPEG')[:-900], 'damaged'), (file(photo(), 'BMP')[:-9], 'damaged'), (file(photo(), 'TIFF')[:90], 'a file of 90 bytes'),
    (png(8, 8, bytes(8*20)), 'damaged'), (png(0, 8), 'a file of'), (png(2, 4000), '2 x 4000 pixels'), (bomb, 'more than 89478485 pixels'), (large, 'more than 89478485 pixels'),
])
@pytest.mark.filterwarnings('ignore::PIL.Image.DecompressionBombWarning')
def test_one_sentence(data, says):
    with pytest.raises(ValueError, match=says) as e: read_image(data)
    assert '\n' not in str(e.value) and len(str(e.value)) < 300

def test_the_sentence_names_the_file(tmp_path):
    (tmp_path/'cat.jpg').write_bytes(b'<html>404</html>')
    with pytest.raises(ValueError, match='cat.jpg is no image'): read_image(tmp_path/'cat.jpg')

def test_warnings_that_are_errors_are_a_sentence():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        with pytest.raises(ValueError, match='more than'): read_image(large)

def test_what_is_not_there_is_no_damage(tmp_path):
    with pytest.raises(FileNotFoundError): read_image(tmp_path/'nowhere.png')
    with pytest.raises(OSError): read_image(tmp_path)

@pytest.mark.filterwarnings('ignore::PIL.Image.DecompressionBombWarning')
def test_a_bomb_is_not_decoded():
    "Refused by its header: no memory, no time"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    deflated = zlib.compressobj(9); data = b''.join(deflated.compress(bytes(1 << 20)) for _ in range(200)) + deflated.flush() # 200 MB of zeros
    whole = b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', 20_000, 10_000, 8, 0, 0, 0, 0)) + chunk(b'IDAT', data) + chunk(b'IEND', b'')
    with pytest.raises(ValueError, match='more than'): read_image(whole)
    assert len(whole) < 1e6 and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000 # KB

def test_the_limit_is_pillows(monkeypatch):
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 24*36 - 1)
    with pytest.raises(ValueError, match='more than 863 pixels'): read_image(file(photo(), 'BMP'))
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', None)
    assert read_image(file(photo(), 'BMP')).size == (36, 24)

def test_a_limit_of_the_caller():
    assert read_image(file(photo(), 'BMP'), 24*36).size == (36, 24)
    with pytest.raises(ValueError, match='864 pixels, and at most 863 are decoded'): read_image(file(photo(), 'BMP'), 24*36 - 1)

# anything at all

@functools.cache
def real():
    "Files of all kinds"
    clear = photo().convert('RGBA'); clear.putalpha(90)
    frames = dict(save_all=True, append_images=[Image.new('RGB', (36, 24), RED)])
    return [file(photo(), 'PNG'), file(photo(), 'JPEG'), file(photo(), 'JPEG', progressive=True, exif=turned(6).getexif()), file(photo(), 'GIF', **frames), file(photo(), 'WEBP'),
            file(photo(), 'TIFF'), file(photo(), 'TIFF', compression='tiff_lzw'), file(photo(), 'TIFF', compression='tiff_adobe_deflate', **frames), file(photo(), 'TIFF', compression='jpeg'),
            file(clear, 'PNG'), file(clear, 'WEBP', lossless=True), file(photo().quantize(16), 'PNG'), file(Image.fromarray(ramp), 'PNG'), file(Image.fromarray(ramp), 'TIFF'),
            file(photo(), 'BMP'), file(photo(), 'PPM'), file(photo(), 'JPEG2000'), tiff(ramp, 12), file(Image.new('CMYK', (9, 9)), 'JPEG')]

@st.composite
def broken(draw):
    "A real file with bytes changed, cut out or put in, and perhaps its end missing"
    data = bytearray(draw(st.sampled_from(real())))
    for _ in range(draw(st.integers(0, 6))):
        at = draw(st.integers(0, len(data) - 1)) if draw(st.booleans()) else min(draw(st.integers(0, 120)), len(data) - 1) # headers are more fun
        how = draw(st.sampled_from(['flip', 'byte', 'cut', 'put']))
        if how == 'flip': data[at] ^= 1 << draw(st.integers(0, 7))
        elif how == 'byte': data[at] = draw(st.sampled_from([0, 1, 127, 128, 255]))
        elif how == 'cut' and len(data) > 20: del data[at:at + draw(st.integers(1, 8))]
        elif how == 'put': data[at:at] = draw(st.binary(max_size=8))
    return bytes(data[:draw(st.integers(1, len(data)))] if draw(st.integers(0, 3)) == 0 else data)

def within(seconds, f, *args):
    "A call that may not hang"
    def late(*_): raise TimeoutError(f'more than {seconds} s')
    old = signal.signal(signal.SIGALRM, late); signal.alarm(seconds)
    try: return f(*args)
    finally: signal.alarm(0); signal.signal(signal.SIGALRM, old)

ANY = settings(deadline=None, max_examples=600, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large])
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024 # MB

def read_or_refuse(data):
    try: found = within(20, read_image, data)
    except ValueError as e: assert str(e) and 'a file of' in str(e); return None
    assert found.mode == 'RGB' and math.prod(found.size) <= Image.MAX_IMAGE_PIXELS
    found.getpixel((found.width - 1, found.height - 1)) # it is there
    return found

@pytest.mark.filterwarnings('ignore')
def test_broken_files_are_an_image_or_a_sentence(monkeypatch):
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 2_000_000) # 6 MB of RGB
    for data in real(): assert read_or_refuse(data) is not None
    before, read = peak(), []
    @ANY
    @given(broken())
    def tried(data): read.append(read_or_refuse(data) is not None)
    tried()
    assert .05 < np.mean(read) < .95 # both happen
    assert peak() - before < 150

@pytest.mark.filterwarnings('ignore')
@settings(ANY, max_examples=200)
@given(st.one_of(st.binary(max_size=300), st.tuples(st.sampled_from([b'\x89PNG\r\n\x1a\n', b'\xff\xd8\xff\xe0', b'GIF89a', b'II*\0\x08\0\0\0', b'RIFF\x20\0\0\0WEBPVP8 ', b'BM', b'P6 9 9 255 ', b'\0\0\0\x0cjP  \r\n\x87\n']), st.binary(max_size=300)).map(b''.join)))
def test_any_bytes_are_an_image_or_a_sentence(data): read_or_refuse(data)

# lists

def csv(folder, text):
    path = folder/'list.csv'; path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path

@pytest.mark.parametrize('text', ['image,class\na.png,3\n', '\ufeffimage,class\r\na.png,3\r\n', 'class,image\n3,a.png', ' image , class \n a.png,3\n', '"image","class"\n"a.png","3"\n', 'image,class\na.png,3,\n'])
def test_lists_that_say_the_same(tmp_path, text):
    rows = _rows(csv(tmp_path, text))
    assert rows.values.tolist() == [[str(tmp_path/'a.png'), '3', '', 0]]

def test_names_that_pandas_would_drop(tmp_path):
    assert _rows(csv(tmp_path, 'image,class\nNA,null\nnan.png,007\n'))['class'].tolist() == ['null', '007']

@pytest.mark.parametrize('text, says', [
    ('', 'cannot be read as a CSV'), ('image,class\n', 'lists nothing'), ('file,label\na,3\n', 'no column class and no column image; it has file, label'), ('image;class\na.png;3\n', 'no column'),
    ('image,class\n,3\n', 'no image in row 1'), ('image,class\na.png,3\nb.png,\n', 'no class in row 2'), ('image,class\nä.png,3\n'.encode('latin-1'), 'UTF-8'),
    ('image,class\na.png,3\n'.encode('utf-16'), 'UTF-8'), ('image,class,value\na.png,3,one\n', "'one' is no number"), (file(photo(), 'PNG'), 'cannot be read as a CSV'),
    ('image,class\n"a.png,3\n', 'cannot be read|no class'),
])
def test_lists_that_say_nothing(tmp_path, text, says):
    with pytest.raises(ValueError, match=says) as e: _rows(csv(tmp_path, text))
    assert 'list.csv' in str(e.value)

cells = st.one_of(st.text(max_size=12), st.sampled_from(['', 'a.png', '3', '1000', '-1', '1e5', 'NaN', '"', "'", '\0', '\r', '../x', 'x'*5000]))
@st.composite
def lists(draw):
    "Something like a CSV file, in some encoding"
    header = draw(st.one_of(st.lists(cells, max_size=4), st.permutations(['image', 'class', 'mask', 'value']).map(lambda p: p[:draw(st.integers(1, 4))])))
    rows = draw(st.lists(st.lists(cells, max_size=5), max_size=5))
    text = draw(st.sampled_from(['\n', '\r\n', '\r'])).join(draw(st.sampled_from([',', ';', '\t', ', '])).join(r) for r in [header, *rows])
    return draw(st.sampled_from(['', '\ufeff'])).encode() + text.encode(draw(st.sampled_from(['utf-8', 'utf-16', 'latin-1', 'utf-32'])), 'replace')

@pytest.mark.filterwarnings('ignore')
@settings(ANY, max_examples=300)
@given(st.one_of(lists(), st.binary(max_size=200), st.text(max_size=200).map(lambda t: ('image,class\n' + t).encode())))
def test_any_list_is_a_table_or_a_sentence(data):
    with tempfile.TemporaryDirectory() as folder:
        path = csv(Path(folder), data)
        try: rows = within(20, _rows, path)
        except ValueError as e: assert 'list.csv' in str(e) or 'no number' in str(e); return
        assert len(rows) and list(rows) == ['image', 'class', 'mask', 'value'] and (rows.image.str.startswith(folder)).all() and rows['class'].astype(bool).all()

@pytest.mark.filterwarnings('ignore')
@settings(ANY, max_examples=60)
@given(st.lists(st.tuples(cells, st.sampled_from(['3', '5', 'n01440764'])), min_size=1, max_size=4))
def test_any_list_of_files_is_read_or_named(rows):
    "Paths that are nothing, that the system refuses, that are folders: all of them are in `skipped`"
    model = tiny()
    with tempfile.TemporaryDirectory() as folder:
        quoted = [','.join('"' + cell.replace('"', '""') + '"' for cell in row) for row in [('image', 'class'), *rows]]
        (Path(folder)/'list.csv').write_bytes('\n'.join(quoted).encode('utf-8', 'replace'))
        try: files = ImageFiles(Path(folder)/'list.csv', model)
        except ValueError: return
        assert files[:len(files)] is None and set(files.skipped) == set(files.ids)

@functools.cache
def tiny(): return timm.create_model('test_vit').eval()
