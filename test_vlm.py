"""Tests of vlm.py, train.py and sample.py, in vlm.py's order: `python -m pytest -q test_vlm.py`.
Each holds the code against something outside it: another implementation, a worked example or the slow way."""
import ast, contextlib, csv, json, math, os, pathlib, random, re, signal, subprocess, sys
from collections import Counter
from dataclasses import replace
from multiprocessing.pool import ThreadPool
import pytest, torch, torchvision, vlm
from PIL import Image
from torch.nn import functional as F
from torchvision.transforms import functional as TF
from vlm import (PRESETS, MinimalVLM, Shapes, Tokenizer, TransformerConfig, UserError, VLMConfig, collate,
                 image_transform, load_checkpoint, make_dataset, open_image, sample_top_p, save_checkpoint)
HERE = pathlib.Path(__file__).absolute().parent
DATA, ENV = HERE / '..' / 'shared' / 'data', {**os.environ, 'OMP_NUM_THREADS': '2'}
EYE = TransformerConfig(2, 4, 32)
LLAMA = replace(EYE, n_kv_head=2, norm='rms', norm_eps=1e-5, activation='swiglu', position='rope', bias=False)
CFG = VLMConfig(EYE, LLAMA, image_size=32, patch_size=8, projection='pixel_shuffle', vocab_size=300,
                block_size=64)
KINDS = {'llama': CFG, 'linear': replace(CFG, projection='linear'),
         'gpt2': replace(CFG, text=EYE, class_token=True, projection='mlp', projection_hidden=64),
         'perceiver': replace(CFG, projection='perceiver', n_latents=5),
         'conv': replace(CFG, text=EYE, stem='conv', input_norm=True),
         'resnet': replace(CFG, vision=TransformerConfig(1, 4, 512), encoder='resnet18', projection='linear')}
@pytest.fixture(params=KINDS)
def cfg(request): return KINDS[request.param]
def build(cfg): return torch.manual_seed(0) and MinimalVLM(cfg).eval()
def some(cfg, B=3, T=7):
    g, size = torch.Generator().manual_seed(1), cfg.image_size
    return torch.randn(B, 3, size, size, generator=g), torch.randint(0, cfg.vocab_size, (B, T), generator=g)
def close(a, b, limit=1e-4):
    worst = (a - b).abs().max().item()
    assert worst <= limit, f'largest difference {worst:.2e}, allowed {limit:.0e}'
def refuses(match, call, *args, **more):
    with pytest.raises(UserError, match=match) as e: call(*args, **more)
    return str(e.value)
def loads(path):
    with contextlib.suppress(Exception): return Image.open(path).load() is not None
table = lambda path: csv.DictReader(path.read_text().splitlines())
def run(script, *args, cwd):
    return subprocess.run([sys.executable, HERE / script, *args], cwd=cwd, env=ENV, timeout=200,
                          capture_output=True, text=True, errors='replace')
def test_files_keep_to_their_length_and_width():
    for name, cap in {'vlm.py': 780, 'train.py': 300, 'sample.py': 130, 'test_vlm.py': 600}.items():
        lines = (HERE / name).read_text(encoding='utf-8').splitlines()
        assert len(lines) <= cap and max(map(len, lines)) <= 110, (name, len(lines), max(map(len, lines)))
def test_presets_have_the_published_sizes_and_start_at_the_entropy_of_a_guess():
    refuses('stem=Conv: wanted one of patch, conv', replace, PRESETS['tiny'], stem='Conv')
    refuses('patch_size=14', MinimalVLM, replace(PRESETS['tiny'], patch_size=14, image_size=56))
    for name, cfg in PRESETS.items():
        model, (images, ids) = build(cfg).train(), some(cfg, 2, 8)
        n = sum(p.numel() for p in model.parameters())
        assert (name != 'nanovlm' or n == 222_081_600) and (name != 'base' or 205e6 < n < 225e6), (name, n)
        eye, loss = model.vision.blocks[0].attn, model(images, ids, ids)[1]
        assert abs(loss.item() / math.log(cfg.vocab_size) - 1) < 0.05, (name, loss.item())
        loss.backward()
        assert all(p.grad is not None for p in model.parameters()) and eye.q.weight.equal(eye.k.weight), name
        assert model.generate(images, ids, max_new_tokens=2).shape == (2, 10)
def test_attend_equals_an_example_worked_by_hand():
    """Two keys with scores 0 and ln 3 (after the division by sqrt(4) = 2) are weighed 1/4 and 3/4."""
    q, k = torch.tensor([[[[1.0, 0, 0, 0]]]]), torch.tensor([[[[0.0, 0, 0, 0], [2 * math.log(3), 0, 0, 0]]]])
    y, att = vlm.attend(q, k, torch.tensor([[[[4.0, 0, 0, 0], [0, 8.0, 0, 0]]]]))
    close(att, torch.tensor([0.25, 0.75]), 1e-6), close(y, torch.tensor([1.0, 6.0, 0, 0]), 1e-5)
@pytest.mark.parametrize('causal', [False, True])
@pytest.mark.parametrize('stack', [EYE, LLAMA], ids=['heads', 'grouped'])
def test_fused_attention_equals_the_spelled_out_one(stack, causal):
    torch.manual_seed(0)
    att, x, rope = vlm.Attention(stack, causal), torch.randn(2, 6, 32), vlm.LanguageDecoder(CFG).rope[:, :6]
    mask = None if causal else (torch.rand(2, 1, 6, 6) > 0.4) | torch.eye(6, dtype=torch.bool)
    fused, kv = att(x, mask=mask, rope=rope), torch.zeros(2, 2, att.n_kv_head, 6, 8)
    parts = [att(x[:, i:j], rope=rope[:, i:j], cache=(kv, i)) for i, j in ((0, 3), (3, 5), (5, 6))]
    if causal: close(torch.cat(parts, dim=1), fused, 1e-5)
    att.maps = []
    close(att(x, mask=mask, rope=rope), fused, 1e-5)
    assert att.maps[0].shape == (2, 4, 6, 6) and (not causal or att.maps[0].triu(1).abs().max() == 0)
def test_gradient_checkpointing_changes_no_gradient_and_keeps_less(cfg):
    grads, kept, model, (images, ids) = [], ([], []), build(cfg).train(), some(cfg)
    for on in (False, True):
        model.vision.grad_checkpointing = model.decoder.eval().grad_checkpointing = on       # frozen, say
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept[on].append(x.numel()) or x, lambda x: x):
            loss = model(images, ids, ids, return_logits=False)[1]
        grads.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, [*model.parameters()])]))
    close(*grads, 1e-6)
    assert sum(kept[1]) < sum(kept[0])
SIZES, WORD = dict(num_hidden_layers=2, num_attention_heads=4, hidden_size=32), dict(vocab_size=300)
PUBLIC = {'siglip': dict(vision=replace(vlm.SIGLIP['vision'], n_layer=2, n_head=4, n_embd=32, n_hidden=64)),
          'vit': dict(vision=replace(EYE, n_hidden=64), class_token=True), 'resnet': dict(encoder='resnet18'),
          'gpt2': dict(text=replace(vlm.PUBLIC['gpt2'][1]['text'], n_layer=2, n_head=4, n_embd=32)),
          'llama': dict(text=replace(LLAMA, n_hidden=96, rope_base=1e5))}
def published(kind, folder):
    """Random weights, written as they are published by the code that does so: its model, and their path."""
    tf, path = pytest.importorskip('transformers'), f'{folder}/{kind}'
    model = {'vit': lambda: torchvision.models.VisionTransformer(64, 16, 2, 4, 32, 64),
             'resnet': torchvision.models.resnet18,
             'siglip': lambda: tf.SiglipModel(tf.SiglipConfig(text_config=SIZES | WORD, vision_config=dict(
                 SIZES, intermediate_size=64, image_size=64, patch_size=16))),
             'gpt2': lambda: tf.GPT2LMHeadModel(tf.GPT2Config(
                 **WORD, n_positions=64, n_embd=32, n_layer=2, n_head=4)),
             'llama': lambda: tf.LlamaForCausalLM(tf.LlamaConfig(
                 **SIZES, **WORD, intermediate_size=96, num_key_value_heads=2, rms_norm_eps=1e-5,
                 rope_theta=1e5, tie_word_embeddings=True))}[kind]().eval()
    for p in model.parameters() if kind != 'resnet' else (): torch.nn.init.normal_(p, std=0.2)
    if hasattr(model, 'save_pretrained'): model.save_pretrained(path)
    else: torch.save(model.state_dict(), path := f'{path}.pth')
    return model, path
def features(kind, model, images):
    """What a published vision model makes of images, before its head: (B,cells,C)."""
    if kind == 'siglip': return model.vision_model(images, interpolate_pos_encoding=True).last_hidden_state
    if kind == 'resnet': return torch.nn.Sequential(*[*model.children()][:-2])(images).flatten(2).mT
    x = torch.cat([model.class_token.expand(len(images), -1, -1), model._process_input(images)], 1)
    return model.encoder(x)[:, 1:]
@pytest.mark.parametrize('eye, mouth, size', [
    ('siglip', 'gpt2', 64), ('siglip', 'llama', 96), ('vit', 'llama', 64), ('resnet', 'gpt2', 64)])
def test_public_parts_combine_and_do_what_they_do_at_home(tmp_path, eye, mouth, size):
    """To 5e-6, in bfloat16 to 1/50 of the largest value. At 96 pixels positions are interpolated from 64."""
    (see, a), (say, b) = published(eye, tmp_path), published(mouth, tmp_path)
    cfg = VLMConfig(**PUBLIC[eye], **PUBLIC[mouth], image_size=size, vocab_size=300, block_size=64)
    model, (x, ids) = MinimalVLM.from_pretrained(f'{a},{b}', cfg).eval(), some(cfg, 2, 9)
    close(model.vision(x), features(eye, see, x), 5e-6), close(model(None, ids)[0], say(ids).logits, 5e-6)
    theirs = say.generate(ids, max_new_tokens=50, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(model.generate(None, ids, max_new_tokens=50, temperature=0), theirs)
    model, low = model.bfloat16(), x.bfloat16()
    for ours, ref in ((model(None, ids)[0], say.bfloat16()(ids).logits),
                      (model.vision(low), features(eye, see.bfloat16(), low))):
        close(ours.float(), ref.float(), ref.abs().max().item() / 50)
NANO = replace(CFG, vision=replace(EYE, activation='gelu_tanh'), text=replace(LLAMA, rope_base=1e5))
def as_nanovlm(model):
    """Our model as the tensors of a nanoVLM file, by the names of ../shared/WEIGHTS.md."""
    own, out = model.state_dict(), {}
    for q in [name for name in own if name.startswith('vision') and '.q.' in name]:
        own[q.replace('.q.', '.qkv_proj.')] = torch.cat([own.pop(q.replace('.q.', f'.{x}.')) for x in 'qkv'])
    words = {'decoder': [('embedding', 'token_embedding'), (r'((attn|mlp)\.\w+)(?<!_proj)\.', r'\1_proj.')],
             'vision': [(r'norm(\d)', r'ln\1'), (r'\bnorm', 'layer_norm'), ('out', 'out_proj'), ('up', 'fc1'),
                        ('down', 'fc2'), ('position', 'patch_embedding.position_embedding'),
                        ('stem', 'patch_embedding.conv'), ('vision', 'vision_encoder')],
             'projection': [('projection', 'MP')]}
    for name, x in own.items():
        x = x[None] if name == 'vision.position' else x
        for ours, theirs in words[name.split('.')[0]]: name = re.sub(ours, theirs, name)
        out[name] = x
    return out
def test_nanovlms_layout_loads_whole_and_comes_back_bit_for_bit(tmp_path):
    """With its quirks: the tied weight under either name or both, a rotary buffer; and strictly."""
    st, path = pytest.importorskip('safetensors.torch'), tmp_path / 'model.safetensors'
    tensors = as_nanovlm(build(NANO)) | {'decoder.rotary_embd.inv_freq': torch.ones(4)}
    assert len(tensors) == 51 and {
        'vision_encoder.blocks.1.attn.qkv_proj.bias', 'vision_encoder.layer_norm.bias', 'MP.proj.weight',
        'decoder.blocks.1.attn.k_proj.weight', 'decoder.blocks.1.mlp.gate_proj.weight'} < tensors.keys()
    alone = {k: v for k, v in tensors.items() if 'token_embedding' not in k}
    head = {'decoder.head.weight': tensors['decoder.token_embedding.weight'].clone()}
    for file in (tensors, tensors | head, alone | head):
        st.save_file(file, path)
        again = as_nanovlm(MinimalVLM.from_pretrained(str(tmp_path), NANO))
        assert again.keys() == tensors.keys() - {'decoder.rotary_embd.inv_freq'}
        assert all(torch.equal(again[k], tensors[k]) for k in again)
    for words, change in {'Missing.*decoder.embedding': alone, 'Unexpected.*more': {'more': torch.ones(2)},
                          'size mismatch.*projection.proj': {'MP.proj.weight': torch.ones(2, 2)},
                          'two decoder': {'decoder.head.weight': torch.ones(300, 32)}}.items():
        st.save_file(change if change is alone else tensors | change, path)
        assert '\n' not in refuses(words, MinimalVLM.from_pretrained, str(path), NANO)
Evil = type('Evil', (), {'__reduce__': lambda self: (os.system, ('touch executed',))})
def test_hostile_weights_are_refused_in_one_line_and_run_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = lambda header: len(text := json.dumps(header).encode()).to_bytes(8, 'little') + text + bytes(16)
    entry = lambda **more: file({'wte.weight': dict(dtype='F32', shape=[2, 2], data_offsets=[0, 16]) | more})
    torch.save({'wte.weight': Evil()}, 'evil.pth')
    lies = dict(shape=[[2, 3], [-2, -2], [2 ** 62, 4], 'x'], dtype=['F99', 'BF16'],
                data_offsets=[[8, 24], [-16, 0], [0, 10 ** 18], 7])
    for content in (b'', b'hello', (tmp_path / 'evil.pth').read_bytes(), entry()[:-1], entry()[:30],
                    file([1]), file({'x': 3}), *(entry(**{k: v}) for k in lies for v in lies[k])):
        (tmp_path / 'w.safetensors').write_bytes(content)
        assert '\n' not in refuses('s: no public', MinimalVLM.from_pretrained, 'w.safetensors', NANO)
    for path in ('evil.pth', 'not there', '.'):
        assert '\n' not in refuses('no public weights', MinimalVLM.from_pretrained, path)
    assert not os.path.exists('executed')
def test_a_published_name_is_downloaded_once_and_never_taken_half(tmp_path, monkeypatch):
    """By PyTorch's own downloader, from a folder that stands for the hub."""
    st, real, got = pytest.importorskip('safetensors.torch'), torch.hub.download_url_to_file, []
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: f'{tmp_path}/cache')
    monkeypatch.setitem(vlm.PUBLIC, 'mini', ('me/mini', vars(NANO) | dict(tokenizer='mini')))
    def download(url, path):
        got.append(url)
        real(re.sub('https://[^/]*', f'file://{tmp_path}', url), path, progress=False)
    monkeypatch.setattr(torch.hub, 'download_url_to_file', download)
    assert '\n' not in refuses('main/model.safetensors did not come: try again, put', load_checkpoint, 'mini')
    refuses('--tokenizer=bpe.*openai-community/gpt2/', Tokenizer.make, 'gpt2')
    assert got and not [*(tmp_path / 'cache').rglob('*.*')]
    (hub := tmp_path / 'me/mini/resolve/main').mkdir(parents=True)
    st.save_file(as_nanovlm(model := build(NANO)), f'{hub}/model.safetensors')
    byte_level_bpe(f'{hub}/tokenizer.json', digits=True)
    for _ in range(2):
        again, more = load_checkpoint('mini')
        assert torch.equal(again(*some(NANO))[0], model(*some(NANO))[0]) and more['tokenizer'].name == 'mini'
    assert len(got) == 4 and vlm.fetch(str(hub)) == f'{hub}/model.safetensors'
    for name in ('vit_b_16', 'resnet50'): refuses(f'download.pytorch.org/models/{name}-', vlm.fetch, name)
def test_pixel_shuffle_takes_rows_then_columns_then_channels():
    joint, x = vlm.MultimodalProjection(CFG, 32), torch.arange(16 * 32.0).view(4, 4, 32)
    joint.proj = torch.nn.Identity()
    want = [torch.cat([x[r, c], x[r, c + 1], x[r + 1, c], x[r + 1, c + 1]]) for r in (0, 2) for c in (0, 2)]
    assert torch.equal(joint(x.view(1, 16, 32))[0], torch.stack(want))
def test_loss_is_that_of_predicting_each_token_from_what_is_before_it(cfg):
    model, (images, ids) = build(cfg), some(cfg)
    targets, slow = ids.clone(), []
    targets[0, :3], targets[1, 5:] = -100, -100
    logits, loss = model(images, ids, targets)
    for b, t in (targets != -100).nonzero().tolist():
        h = model.hidden(model.see(images[b]), ids[b:b + 1, :t])
        slow.append(-model.decoder.head(h[0, -1]).log_softmax(-1)[ids[b, t]])
    close(loss, torch.stack(slow).mean(), 1e-4)
    close(F.cross_entropy(logits[2, :-1], ids[2, 1:]), torch.stack(slow[-6:]).mean(), 1e-4)
def test_the_contrastive_loss_is_that_of_siglips_paper():
    """Each image with each text, read alone: the mean over images of -log sigmoid(+-(10 cosine - 5))."""
    model, (images, ids), start = build(CFG), some(CFG), torch.tensor([0] * 3 + [3] * 4).expand(3, 7)
    eyes, alone = model.see(images).mean(1)[:, None], lambda text: model.hidden(model.see(None), text)[:, 1:]
    plain, both = (model(images, ids, ids, start, contrastive=weight)[1] for weight in (0, 0.5))
    words = torch.cat([alone(ids[:, :3]), alone(ids[:, 3:])], dim=1).mean(1)     # of both texts of a row
    signs = (20 * F.cosine_similarity(eyes, words, dim=-1) - 10) * (torch.eye(3) - 0.5)
    close(both - plain, -0.5 * F.logsigmoid(signs).sum() / 3, 1e-5)
def test_text_sees_the_image_and_the_past_but_not_the_future(cfg):
    model, (images, ids) = build(cfg), some(cfg)
    logits, changed = model(images, ids)[0], ids.clone()
    changed[:, 4] = (changed[:, 4] + 1) % cfg.vocab_size
    other = model(images, changed)[0]
    assert torch.equal(logits[:, :4], other[:, :4]) and not torch.allclose(logits[:, 4:], other[:, 4:])
    assert (model(images.roll(1, 0), ids)[0] - logits).abs().max() > 1e-4
    close(model(images, F.pad(ids, (0, 5)))[0][:, :7], logits, 1e-5)       # padding on the right is not seen
    close(model(images[1], ids[1])[0][0], logits[1], 1e-5)                 # nor is the rest of the batch
def test_generation_is_the_same_with_and_without_cache_in_batches_and_alone(cfg):
    model, (images, ids) = build(cfg), some(cfg)
    plain = model.generate(images, ids, max_new_tokens=12, temperature=0)
    assert torch.equal(plain, model.generate(images, ids, max_new_tokens=12, temperature=0, use_cache=False))
    for t in range(12):                                                    # and it is what forward says
        assert torch.equal(model(images, plain[:, :7 + t])[0][:, -1].argmax(-1), plain[:, 7 + t])
    stop, prompts = int(plain[0, 9]), [ids[0], ids[1, :0], ids[2, :4]]
    options = dict(max_new_tokens=12, temperature=0, stop=stop)
    for use_cache in (True, False):
        rows = model.generate(images, prompts, use_cache=use_cache, **options)
        for i, row in enumerate(rows):
            assert torch.equal(row, model.generate(images[i], prompts[i], **options)[0])
    assert rows[0][-1] == stop and len(rows[0]) <= 10
def test_generate_shares_one_image_among_samples_and_leaves_the_mode_alone():
    model, (images, ids) = build(CFG).train(), some(CFG)
    model.vision.eval()                                                    # frozen, say
    out, modes = model.generate(images[0], ids[0], 6, num_samples=5), (model.training, model.vision.training)
    assert out.shape == (5, 13) and len({tuple(r) for r in out.tolist()}) > 1 and modes == (True, False)
    greedy = model.generate(images[:2], ids[:2], max_new_tokens=6, num_samples=2, temperature=0)
    alone = model.eval().generate(images[:2], ids[:2], max_new_tokens=6, temperature=0)
    assert torch.equal(greedy[::2], alone) and torch.equal(greedy[1::2], alone) and len({*alone[:, -1]}) == 2
    assert [model.generate(images[0], ids[0], n).size(1) for n in (999, 0)] == [64 - CFG.n_visual, 7]
    refuses('block_size=64', model.generate, images[0], torch.zeros(70, dtype=torch.long))
    refuses('block_size=64', model, images, ids.repeat(1, 9), None, torch.zeros_like(ids).repeat(1, 9))
    refuses('at least 1', model.generate, None, ids[0, :0])
def test_score_is_the_sum_of_log_probabilities():
    model, (images, ids) = build(CFG), some(CFG)
    prompt, choices = ids[0, :3], [ids[1], ids[2, :2]]
    for score, choice in zip(model.score(images[0], prompt, choices), choices):
        targets = torch.cat([torch.full((3,), -100), choice])
        close(score, -model(images[0], torch.cat([prompt, choice]), targets)[1] * len(choice), 1e-4)
def draws(logits, n=4000, **options):
    torch.manual_seed(0)
    return Counter(sample_top_p(torch.tensor(logits).log().expand(n, -1), **options).flatten().tolist())
def test_top_p_keeps_the_token_that_crosses_p_and_no_more():
    """Of 0.5, 0.3, 0.15, 0.05: p = 0.6 needs the first two, 0.49 only the first, 0.81 the first three."""
    probs = [0.15, 0.5, 0.05, 0.3]
    assert set(draws(probs, p=0.6)) == {1, 3} == set(draws(probs, p=1.0, top_k=2))
    assert set(draws(probs, p=0.49)) == {1} == set(draws(probs, p=1e-9))
    assert set(draws(probs, p=0.81)) == {0, 1, 3} and set(draws(probs, p=1.0)) == {0, 1, 2, 3}
    assert abs(draws(probs, p=0.6)[1] / 4000 - 0.5 / 0.8) < 0.03
def test_temperature_comes_before_top_p_and_zero_is_greedy():
    probs = [0.5, 0.3, 0.2]
    assert set(draws(probs, p=0.75, temperature=0.3)) == {0}               # sharpened, the first holds 0.82
    assert set(draws(probs, p=0.75, temperature=9.0)) == {0, 1, 2}         # flattened, two do not reach 0.75
    assert set(draws(probs, temperature=0)) == {0} == set(draws(probs, temperature=1e-8))
    rows = sample_top_p(torch.tensor([[0.0, 9, 0], [9, 0, 0]]), p=0.5)
    assert rows.tolist() == [[1], [0]] and sample_top_p(torch.tensor([0.0, 9, 0]), p=0.5).tolist() == [1]
    for wrong in (dict(p=0), dict(p=2), dict(temperature=-1), dict(top_k=-1)):
        refuses('must be >= 0', sample_top_p, torch.zeros(3), **wrong)
def test_a_checkpoint_gives_back_model_tokenizer_and_extras(tmp_path, cfg):
    model, tok = build(cfg), Tokenizer.make('bpe', ['a small red cat, a red hat'] * 3, 300)
    save_checkpoint(f'{tmp_path}/c.pt', model, tok, step=7)
    again, more = load_checkpoint(f'{tmp_path}/c.pt')
    assert again.cfg == cfg and more['step'] == 7
    assert more['tokenizer'].encode('a red hat') == tok.encode('a red hat')
    assert torch.equal(again(*some(cfg))[0], model(*some(cfg))[0])
def test_damaged_foreign_and_hostile_checkpoints_are_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / 'c.pt'
    refuses('train.py', load_checkpoint, str(path))
    save_checkpoint(str(path), build(CFG), Tokenizer.make('bytes'))
    for content in (path.read_bytes()[:100_000], b'', b'hello', {'model': Evil()}, {'some': 'thing'}):
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        assert '\n' not in refuses(f'{path} is damaged', load_checkpoint, str(path))
    assert not os.path.exists('executed')
def test_a_save_that_fails_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path, tok = f'{tmp_path}/c.pt', Tokenizer.make('bytes')
    save_checkpoint(path, build(CFG), tok, step=1)
    def full(*args):
        args[1].write(b'half of it')
        raise OSError('No space left on device')
    monkeypatch.setattr(torch, 'save', full)
    refuses('No space left', save_checkpoint, path, build(CFG), tok, step=2)
    assert load_checkpoint(path)[1]['step'] == 1
WORDS = ['a small red cat sits on a red mat', 'the cat sat, a mat sat', 'two cats, 12 hats, café 😀']
def texts(n, rng=random.Random(0)):
    kinds = [(32, 127), (97, 123), (48, 58), (9, 14), (32, 33), (160, 592), (19968, 20224), (128512, 128576)]
    for _ in range(n): yield ''.join(chr(rng.randrange(*rng.choice(kinds))) for _ in range(rng.randrange(26)))
@pytest.mark.parametrize('name', ['bytes', 'bpe'])
def test_tokenizers_give_any_text_back_also_from_their_state(name):
    tok = Tokenizer.make(name, WORDS * 2, 300)
    again = Tokenizer(**json.loads(json.dumps(tok.state)))
    for text in [*texts(500), *WORDS, '<|endoftext|>']:
        ids = tok.encode(text)
        assert tok.decode(ids) == text and again.encode(text) == ids and tok.eos not in ids
    assert tok.decode([tok.eos]) == '' and max(tok.eos + 1, 257) == tok.n_vocab
def test_learned_bpe_equals_the_slow_way():
    words = Counter(w for t in WORDS * 2 for w in re.findall(r' ?[^\W\d_]+|\d| ?(?:[^\w\s]|_)+|\s+', ' ' + t))
    parts = {w: list(w.encode().decode('latin-1')) for w in words}
    ranks = vlm.learn_bpe(WORDS * 2, 320)
    learned = [token for token in sorted(ranks, key=ranks.get) if ranks[token] > 255]
    assert len(learned) > 30 and ' cat' in learned
    for token in learned:
        pairs = Counter(pair for w, p in parts.items() for pair in [*zip(p, p[1:])] * words[w])
        best = [pair for pair in pairs if ''.join(pair) == token]
        assert best and pairs[best[0]] == max(pairs.values())
        for p in parts.values():
            for i in range(len(p)):
                if tuple(p[i:i + 2]) == best[0]: p[i:i + 2] = [token]
def test_streamed_text_never_breaks_a_character():
    pieces = [*(tok := Tokenizer.make('bytes')).stream(tok.encode('é😀!'))]
    assert ''.join(pieces) == 'é😀!' and '�' not in ''.join(pieces) and '' in pieces
    assert tok.decode(tok.encode('😀')[:2]) == '�' and tok.decode([99999]) == ''
    assert (tok := Tokenizer.make('bpe', ['\ud83d'], 300)).decode(tok.encode('\ud83d')) == '�'
def byte_level_bpe(path, digits):
    tk = pytest.importorskip('tokenizers')
    pre, theirs = tk.pre_tokenizers.ByteLevel(add_prefix_space=False), tk.Tokenizer(tk.models.BPE())
    theirs.decoder, split = tk.decoders.ByteLevel(), tk.pre_tokenizers.Digits(individual_digits=True)
    theirs.pre_tokenizer = tk.pre_tokenizers.Sequence([split, pre]) if digits else pre
    theirs.train([str(HERE / 'README.md')], tk.trainers.BpeTrainer(
        vocab_size=700, special_tokens=['<|endoftext|>', '<pad>'], initial_alphabet=pre.alphabet()))
    theirs.save(path)
    return theirs
@pytest.mark.parametrize('digits', [True, False])
def test_a_tokenizer_json_gives_what_the_tokenizers_package_gives(tmp_path, digits):
    theirs, tok = byte_level_bpe(f'{tmp_path}/tokenizer.json', digits), Tokenizer.make(str(tmp_path))
    for text in texts(10_000):
        ids = theirs.encode(text).ids
        assert tok.encode(text) == ids and tok.decode(ids) == theirs.decode(ids) == text, repr(text)
    assert tok.eos == 0 and tok.n_vocab == theirs.get_vocab_size()
    data = json.loads((tmp_path / 'tokenizer.json').read_text(encoding='utf-8'))
    data['model']['merges'].reverse()
    refuses('do not follow', Tokenizer.make, write(tmp_path / 'tokenizer.json', json.dumps(data)))
def test_every_kind_of_image_becomes_upright_8_bit_rgb():
    """A picture with a white top and a black bottom half, in many modes; 16 bits are scaled, not clipped."""
    base, clear = Image.new('L', (8, 8), 0), Image.new('RGBA', (8, 8), (0, 0, 0, 255))
    base.paste(255, (0, 0, 8, 4))
    clear.paste((0, 0, 0, 0), (0, 0, 8, 4))
    deep = Image.frombytes('I;16', (8, 8), b'\xff\xff' * 32 + bytes(64))
    turned, unit = base.rotate(180), Image.frombytes('F', (8, 8), b'\0\0\x80?' * 32 + bytes(128))   # 1.0
    turned.getexif()[274] = 3
    pictures = {mode: base.convert(mode) for mode in ('L', 'RGB', 'P', '1', 'I', 'F')}
    pictures |= dict(cmyk=base.convert('RGB').convert('CMYK'), deep=deep, unit=unit, alpha=clear,
                     exif=turned, la=Image.merge('LA', [base, Image.new('L', (8, 8), 255)]))
    for name, rgb in {name: vlm.to_rgb(picture) for name, picture in pictures.items()}.items():
        seen = rgb.mode, rgb.size, rgb.getpixel((4, 1)), rgb.getpixel((4, 6))
        assert seen == ('RGB', (8, 8), (255,) * 3, (0,) * 3), (name, seen)
    half = vlm.to_rgb(Image.frombytes('I;16', (1, 1), (32768).to_bytes(2, 'little'))).getpixel((0, 0))
    assert abs(half[0] - 127) <= 1
def test_pixels_are_normalised_as_the_config_says():
    cfg = replace(CFG, image_mean=(0.1, 0.2, 0.3), image_std=(0.5, 0.6, 0.7), image_resize='crop')
    picture = Image.effect_noise((60, 40), 90).convert('RGB')
    pixels, model = image_transform(cfg)(picture), build(cfg)        # bytes
    close(model.see(pixels), model.see(TF.normalize(pixels / 255, cfg.image_mean, cfg.image_std)), 1e-6)
    close(pixels.float(), TF.center_crop(TF.pil_to_tensor(TF.resize(picture, 32)).float(), 32), 2.0)
@pytest.mark.filterwarnings('ignore')
@pytest.mark.skipif(not os.path.isdir(f'{DATA}/odd_images'), reason='needs ../shared/data/odd_images')
def test_awkward_files_are_read_or_refused_by_name():
    """As Pillow's own load() has it, but for pictures of too many pixels."""
    for row in table(DATA / 'odd_images' / 'manifest.csv'):
        path, fits = f"{DATA}/odd_images/{row['file']}", 'bomb' not in row['file']
        try:
            image_transform(CFG)(open_image(path, 32))
        except UserError as e:
            assert row['file'] in str(e) and '\n' not in str(e) and not (fits and loads(path)), row
def test_a_batch_is_padded_on_the_right_and_scored_on_answers_only():
    tok, items = Tokenizer.make('bytes'), [(Image.new('L', (9, 9)), *w) for w in (('q?', 'yes'), ('', 'no'))]
    px, ids, targets = collate(items, CFG, tok, image_transform(CFG))
    long, both = (collate(rows, CFG, tok, image_transform(CFG))[1].tolist() for rows in (
        [(items[0][0], 'q' * 99, 'a' * 99)], [(items[0][0], 'q?', 'a' * 40)] * 2))    # both share a row
    assert long == [[*b'q' * 45, *b' ' + b'a' * 14]] and both == [([*b'q? ' + b'a' * 40, 256] * 2)[:60]]
    assert len(px) == 2 and ids.tolist() == [[*b'q? yes', 256, *[0] * 9], [*b' no', 256, *[0] * 12]]
    assert targets.tolist() == [[-100, -100, *b' yes', 256] + 9 * [-100], [*b' no', 256] + 12 * [-100]]
def test_texts_that_share_an_image_and_a_row_teach_what_they_teach_alone(cfg):
    cfg, tok, data = replace(cfg, block_size=400), Tokenizer.make('bytes'), Shapes('train', 3)
    items = [item for i, n in enumerate((3, 1, 4)) for item in data.about(i)[:n]]
    items = [(image, question * (i % 2), answer) for i, (image, question, answer) in enumerate(items)]
    copies, both, model = [(image.copy(), *words) for image, *words in items], [], build(cfg)
    packed, alone = (collate(rows, cfg, tok, image_transform(cfg)) for rows in (items, copies))
    assert len(packed) == 4 and packed[1].size(0) == 3 and len(alone) == 3 and alone[1].size(0) == 8
    for batch in (packed, alone):
        model.zero_grad()
        loss = model(*batch, return_logits=False)[1]
        loss.backward()
        both.append((loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])))
    close(both[0][0], both[1][0], 1e-5), close(both[0][1], both[1][1], 1e-5)
def test_scenes_come_from_seed_split_and_index_and_keep_unseen_pairs_out_of_training():
    (a, *b), (c, *d), e, f = (Shapes(*which)[5] for which in (['train', 1],) * 2 + (['train', 2], ['val', 1]))
    assert b == d and a.tobytes() == c.tobytes() != e[0].tobytes() != f[0].tobytes() != c.tobytes()
    assert len(vlm.UNSEEN) >= 6 and len(vlm.COLORS) >= 8 and len(vlm.SHAPES) >= 6
    for split in ('train', 'val'):
        text = ' '.join(' '.join(Shapes(split, 3)[i][1:]) for i in range(600))
        assert not [pair for pair in vlm.UNSEEN if pair in text]
    for text in (Shapes('novel', 3, 'caption')[i][2] for i in range(100)):
        assert 1 <= len(re.findall('|'.join(vlm.UNSEEN), text)) == len(re.findall('small|large', text)) <= 3
THING = rf"({'|'.join(sorted(vlm.PLACES, key=len)[::-1])}) a (?:small|large) (\w+) (\w+)"
def test_captions_tell_what_is_drawn():
    centers = {p: (0.21 + 0.29 * (i % 3), 0.21 + 0.29 * (i // 3)) for i, p in enumerate(vlm.PLACES)}
    for image, _, text in map(Shapes('val', 5, 'caption', pixels=200).__getitem__, range(200)):
        colors = {place: vlm.COLORS[color] for place, color, _ in re.findall(THING, text)}
        assert 0 < len(colors) == len(re.findall('small|large', text))
        assert sorted(colors, key=vlm.PLACES.index) == [*colors]
        for place, (x, y) in centers.items():
            seen = [image.getpixel((200 * x + i, 200 * y + j)) for i in (-8, 0, 8) for j in (-8, 0, 8)]
            far = [max(abs(a - b) for a, b in zip(pixel, colors.get(place, pixel))) for pixel in seen]
            assert min(far) <= 30 if place in colors else min(seen[4]) > 200 or len(colors) > 1, text
def test_answers_to_questions_agree_with_the_caption_of_the_scene():
    for asked in map(Shapes('train', 9).about, range(60)):
        found = re.findall(THING, next(answer for _, question, answer in asked if not question))
        things = [f'{color} {shape}' for _, color, shape in found]
        column = {shape: ('right' in place) - ('left' in place) for place, _, shape in found}
        for _, question, answer in (item for item in asked if item[1]):
            if what := re.search(r'how many .*?(\w+)\?', question):
                assert answer == 'zero one two three'.split()[sum(what[1] in f'there {t}' for t in things)]
            elif what := re.search(r'is there an? (.*)\?', question):
                assert (answer == 'yes') == (what[1] in things)
            elif what := re.search(r'is the (\w+) left or right of the (\w+)', question):
                assert answer == ('left' if column[what[1]] < column[what[2]] else 'right')
            elif what := re.search(r'what shape is (.*)\?', question):
                assert [answer] == [shape for place, _, shape in found if place == what[1]]
            else:
                what, *options = re.findall(r'(\w+)(?=[:,?]| or )', question)
                assert things.count(f'{answer} {what}') == 1 and len({*options}) == len(options), question
                assert not options or {color for _, color, _ in found} <= {*options}, question
def photos(folder, n):
    os.makedirs(folder, exist_ok=True)
    for i in range(n): Image.new('RGB', (40, 30), (i, 0, 0)).save(f'{folder}/{i}.png')
write = lambda path, text: path.write_text(text) and str(path)
def test_every_caption_format_gives_the_same_items(tmp_path):
    photos(f'{tmp_path}/images', 4)
    def items(name, text):
        path = write(tmp_path / name, text)
        data = make_dataset(path, 'val', val_spec=path)
        return sorted((im.getpixel((0, 0))[0], *text) for im, *text in (data[i] for i in range(len(data))))
    want = [(i, '', f'photo, number {i}') for i in range(4)]
    rows = [{'image': f'{i}.png', 'caption': f'photo, number {i}'} for i in range(4)]
    assert items('a.csv', '\n'.join(['image,caption', *(f'{i}.png,"{text}"' for i, _, text in want)])) == want
    assert items('a.jsonl', '\n'.join(map(json.dumps, rows))) == want
    coco = {'images': [{'id': i, 'file_name': f'{i}.png'} for i in range(4)],
            'annotations': [{'image_id': i, 'caption': row['caption']} for i, row in enumerate(rows)]}
    assert items('a.json', json.dumps(coco)) == want
    qa = [(i, f'{w}?', f'{w} {i}') for i in range(4) for w in ('who', 'why')]
    talk = [{'image': f'{i}.png', 'conversations': [{'from': 'system', 'value': 'Be brief.'},
        {'from': 'human', 'value': '<image>\nwho?'}, {'from': 'gpt', 'value': f'who {i}'},
        {'from': 'human', 'value': 'why?'}, {'from': 'gpt', 'value': f'why {i}'}]} for i in range(4)]
    assert items('b.json', json.dumps([*talk, {'conversations': talk[0]['conversations'][2:]}])) == qa
    assert items('c.jsonl', json.dumps(dict(image='0.png', prompt='n?', answer=0))) == [(0, 'n?', '0')]
    rows = [dict(image=f'{i}.png', prompt=q, answer=a) for i, q, a in qa]
    assert items('b.jsonl', '\n'.join(map(json.dumps, rows))) == qa
def test_a_folder_of_class_folders_and_the_split_by_image(tmp_path):
    names = lambda data: {data.entry(i)[0] for i in range(data.n_images)}
    for name in ('cat', 'sea_horse'): photos(f'{tmp_path}/{name}', 30)
    train, val = (make_dataset(str(tmp_path), split) for split in ('train', 'val'))
    assert (len(train), len(val)) == (57, 3) and not names(train) & names(val)
    assert {train[i][1:] for i in range(57)} == {('what is this?', 'cat'), ('what is this?', 'sea horse')}
    path = write(tmp_path / 'c.csv', 'image,caption' + ''.join(f'\ncat/{i % 30}.png,say' for i in range(90)))
    train, val = (make_dataset(path, split) for split in ('train', 'val'))
    assert len(train) + len(val) == 90 and len(val) == 3 and not names(train) & names(val)
def test_bad_rows_and_images_are_named_and_do_not_stop_a_run(tmp_path, capfd):
    photos(tmp_path, 3)
    write(tmp_path / '1.png', 'not a picture')
    path = write(tmp_path / 'c.csv', 'image,caption\n' + ''.join(f'{i}.png,say {i}\n' for i in (0, 1, 2, 7)))
    data = make_dataset(path, 'val', val_spec=path)
    assert 'WARNING' in (err := capfd.readouterr().err) and '1 of 4' in err and '7.png' in err
    assert [data[i][2] for i in (0, 1, 2, 1)] == ['say 0', 'say 2', 'say 2', 'say 2']
    err = capfd.readouterr().err
    assert err.count('over 1 % are bad: skipped: ') == 1 == err.count('skipped') == int(data.bad.sum())
    for name, text, match in [
            ('d.csv', 'picture,text\n0.png,x\n', 'row 1: wanted image and caption'),
            ('d.csv', 'image,caption\nx.png,a\ny.png,b\n', 'names 2 images, none is in'),
            ('d.csv', 'image,caption\n0.png,a\n', 'too few'), ('d.json', '{"images": []}', 'annotations'),
            ('d.jsonl', '{"image": "0.png"}', 'row 1: wanted'),
            ('d.jsonl', '{"image": "0.png"', 'not a caption file')]:
        refuses(match, make_dataset, write(tmp_path / name, text), 'train')
    refuses('neither', make_dataset, f'{tmp_path}/nothing.csv')
    assert not capfd.readouterr().err
def test_wrong_settings_are_one_line_that_helps(capsys):
    names = re.findall(r'^(\w+) = (.*?)  +# ', (HERE / 'train.py').read_text('utf-8').split('# ---')[0], re.M)
    def call(*argv):
        settings = dict({k: ast.literal_eval(v) for k, v in names}, __file__=f'{HERE}/train.py', __doc__='')
        vlm.override(settings, list(argv))
        return settings
    good = call('--batch_size=32', '--learning_rate', '1', '--compile', '--augment=false', '--dataset=my.csv')
    assert good.items() >= dict(batch_size=32, learning_rate=1.0, compile=True, augment=False).items()
    for argv, words in {
            '--bach_size=32': 'did you mean --batch_size', '--max_iters=ten': "'ten' is not a whole number",
            '--batch_size=0': 'as asked for: > 0', '--optimizer=sgd': 'muon', '--beta1=1': 'and < 1',
            '--learning_rate=nan': '> 0', '--compile=maybe': 'true or false', '--out_dir': 'expected one',
            '--seed=1.5': 'whole number', '--min_lr=-0.1': '>= 0 and <= 1', 'x': 'no setting x'}.items():
        with pytest.raises(SystemExit) as stop: call(argv)
        err = capsys.readouterr().err
        assert stop.value.code == 2 and words in err and err.count('\n') == 1, (argv, err)
    with pytest.raises(SystemExit, match='0'): call('--help')
    assert {f'--{name}' for name, _ in names} <= {*re.findall(r'--\w+', capsys.readouterr().out)}
SMALL = '--batch_size=8 --eval_iters=1 --eval_samples=2 --log_interval=1 --dtype=float32'.split()
losses = lambda folder: [row['loss'] for row in table(folder / 'log.csv') if row['loss']]
def test_a_resumed_run_equals_one_that_never_stopped(tmp_path):
    six = [*SMALL, '--max_iters=6', '--contrastive=0.1']
    for name in 'ab':
        assert run('train.py', *six, f'--out_dir={name}', cwd=tmp_path).returncode == 0
    assert losses(tmp_path / 'a') == losses(tmp_path / 'b') and len(losses(tmp_path / 'a')) == 6
    long = subprocess.Popen([sys.executable, HERE / 'train.py', *six, '--num_workers=1', '--out_dir=c'],
                            cwd=tmp_path, env=ENV, stdout=subprocess.PIPE, text=True, start_new_session=True)
    for line in long.stdout:
        if line.startswith('step 3/6'): os.killpg(long.pid, signal.SIGTERM)   # as torchrun does
    assert long.wait() == 0 == run('train.py', '--init_from=resume', '--out_dir=c', cwd=tmp_path).returncode
    whole, again = (torch.load(f'{tmp_path}/{name}/ckpt.pt', weights_only=True)['model'] for name in 'ac')
    assert line.startswith('stopped') and losses(tmp_path / 'c') == losses(tmp_path / 'a')
    assert all(torch.equal(whole[k], again[k]) for k in whole)
    for words, *options in (['--overwrite', '--seed=2'], ['keeps', '--init_from=resume', '--dropout=0.5']):
        other = run('train.py', *six, *options, '--out_dir=a', cwd=tmp_path)
        assert other.returncode == 1 and words in other.stderr and other.stderr.count('\n') == 1
def test_two_processes_lose_what_one_does(tmp_path):
    """The eye is frozen here: batch norm learns from the images of its own process alone."""
    options = [*SMALL, '--max_iters=4', '--freeze=vision', '--projection=perceiver']
    assert run('train.py', *options, cwd=tmp_path).returncode == 0
    both = '-m torch.distributed.run --standalone --nproc_per_node=2'.split() + [HERE / 'train.py', *options]
    subprocess.run([sys.executable, *both, '--out_dir=two'], cwd=tmp_path, timeout=200, env=ENV, check=True)
    one, two = (torch.tensor([*map(float, losses(tmp_path / name))]) for name in ('out', 'two'))
    close(one, two, 2e-4)
@pytest.fixture(scope='session')
def trained(tmp_path_factory):
    options = '--max_iters=300 --eval_samples=10 --eval_iters=2'.split()
    done = run('train.py', *options, cwd=(folder := tmp_path_factory.mktemp('trained')))
    assert done.returncode == 0, done.stderr
    return folder, done.stdout
def test_the_default_job_learns_to_look(trained):
    assert float(re.search(r'image gain (-?[\d.]+)', trained[1])[1]) > 1.0
    assert os.path.getsize(trained[0] / 'out/samples.png') > 10_000 and len(losses(trained[0] / 'out')) == 6
def test_attention_points_at_what_is_named(trained):
    """Where a colour or shape is said, the brightest of 4 x 4 cells touches its thing, nine times in ten."""
    (model, more), data, hits = load_checkpoint(f'{trained[0]}/out/ckpt.pt'), Shapes('val', 5, 'caption'), []
    attns, tok = [block.attn for block in model.decoder.blocks], more['tokenizer']
    for i in range(80):
        (image, _, text), rng = data[i], random.Random(f'5 val {i}')
        scene, ids = data.scene(rng), torch.tensor(tok.encode(' ' + text))
        for attn in attns: attn.maps = []
        model.eval().hidden(model.see(image_transform(model.cfg)(image)), ids[None])
        maps = torch.stack([attn.maps[0][0].mean(0) for attn in attns]).mean(0)
        for token, row in zip(ids.tolist(), maps[15:, :16]):     # the last visual token chose the first word
            word, cell = tok.decode([token]).strip(), int(row.argmax())
            far = max(abs(scene[0].x - (cell % 4 + 0.5) / 4), abs(scene[0].y - (cell // 4 + 0.5) / 4))
            if word in (scene[0].color, scene[0].shape): hits.append(far < scene[0].r + 1 / 8)
            if word == scene[0].shape and len(scene) > 1: scene.pop(0)
    assert len(hits) > 200 and sum(hits) / len(hits) > 0.9, (len(hits), sum(hits) / len(hits))
def test_sample_talks_by_the_public_weights_in_a_folder(tmp_path):
    """nanoVLM at full size, with random weights in bfloat16, says what it says in this process."""
    st, model = pytest.importorskip('safetensors.torch'), build(PRESETS['nanovlm']).bfloat16()
    model.decoder.embedding.weight.data[700:] = 0        # only tokens that the tokenizer has
    st.save_file(as_nanovlm(model), f'{tmp_path}/model.safetensors')
    byte_level_bpe(f'{tmp_path}/tokenizer.json', digits=True)
    Image.effect_noise((90, 60), 90).save(f'{tmp_path}/cat.jpg')
    options = '--init_from=.', '--image=cat.jpg', '--prompt=What?', '--max_new_tokens=8'
    done, tok = run('sample.py', *options, cwd=tmp_path), Tokenizer.make(str(tmp_path))
    pixels = image_transform(model.cfg)(open_image(f'{tmp_path}/cat.jpg', 224))
    ids = torch.tensor(tok.encode('Question: What? Answer:'))
    row = model.float().generate(pixels, ids, max_new_tokens=8, temperature=0, stop=tok.eos)[0]
    said = tok.decode(row[len(ids):]).strip()
    assert done.returncode == 0 and said and said in done.stdout, (done.stderr, done.stdout, said)
def test_sample_answers_ranks_and_goes_on_past_a_bad_picture(tmp_path):
    lost = run('sample.py', cwd=tmp_path)
    assert lost.returncode == 1 and 'python train.py' in lost.stderr and lost.stderr.count('\n') == 1
    os.makedirs(f'{tmp_path}/out')
    cfg, tok = replace(PRESETS['tiny'], vocab_size=257), Tokenizer.make('bytes')
    save_checkpoint(f'{tmp_path}/out/ckpt.pt', build(cfg), tok)
    Image.new('RGB', (50, 40), 'red').save(f'{tmp_path}/red.png')
    write(tmp_path / 'bad.png', 'x')
    alone = run('sample.py', '--max_new_tokens=3', '--attention=look.png', cwd=tmp_path)
    assert alone.returncode == 0 and (tmp_path / 'out/drawn.png').exists() and 'tokens/s' in alone.stdout
    both = run('sample.py', '--image=bad.png,red.png', '--prompt=what?', '--choices=red,blue', cwd=tmp_path)
    assert both.returncode == 1 and 'bad.png' in both.stderr and both.stderr.count('\n') == 1
    shares = [float(x) for x in re.findall(r'([\d.]+)%  (?:red|blue)', both.stdout)]
    assert len(shares) == 2 and abs(sum(shares) - 100) < 0.2
    odd = run('sample.py', '--image=red.png', '--prompt=<|endoftext|> \udcff', cwd=tmp_path)   # just text
    assert odd.returncode == 0 and not odd.stderr and Image.open(f'{tmp_path}/look.png').height == 185
    wrong = [(1, 'could not draw', 'sample.py --attention=x.weird'), (2, '> 0', 'sample.py --top_p=0'),
             (1, 'block_size=112', f'sample.py --prompt={"x" * 999}'), (1, 'no x', 'sample.py --init_from=x'),
             (1, 'PyTorch finds', 'sample.py --device=tpu'), (1, 'cannot be', 'train.py --out_dir=red.png'),
             (1, 'resume goes on', 'train.py'), (1, 'smollm2-135m', 'train.py --out_dir=b --init_from=gpt-2'),
             (1, 'wanted as', 'train.py --out_dir=c --freeze=vision,projection,decoder')]
    with ThreadPool(2) as pool:
        for (code, words, _), got in zip(wrong, pool.map(lambda w: run(*w[2].split(), cwd=tmp_path), wrong)):
            assert (got.returncode, got.stderr.count('\n')) == (code, 1) and words in got.stderr, got.stderr
