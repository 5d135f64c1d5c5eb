"""
A minimal vision-language model: an image and a question go in, words come out.

    image (3,P,P)                             "what color is the star?"
       | VisionEncoder                              | Tokenizer
    features (grid*grid,C)                       ids (T,)
       | MultimodalProjection                       | embedding
    [ v1 v2 ... vN ]  ------ one sequence ------ [ t1 t2 ... tT ]
                                   | LanguageDecoder: causal; the image comes first, so all text sees it
                             logits (T,V) -> sample_top_p -> the next token, and repeat

    model, tokenizer, _ = load_checkpoint('out/ckpt.pt')  # written by train.py
    image = image_transform(model.cfg)(open_image('cat.jpg', size=model.cfg.image_size))
    prompt = torch.tensor([encode_prompt(tokenizer, model.cfg, 'what color is the cat?')])
    ids = model.generate(image[None], prompt, temperature=0, stop=tokenizer.end)
    print(tokenizer.decode(ids[0, prompt.size(1):]))

Sections 1 to 7 are the model. 8 to 11 can wait, except collate (in 10), which lays out a training batch.
Shapes: B batch, P pixels per side, N visual and T text tokens, S = N + T, C channels, V vocabulary.
In attention: L queries, S keys (old and new), H heads, G key/value heads, D channels per head.
"""
import argparse, codecs, contextlib, difflib, json, math, mmap, os, re, sys, urllib.request, warnings
from collections import Counter
from dataclasses import asdict, dataclass, fields, replace
from typing import Literal, get_args
import tiktoken, torch, torch.utils.checkpoint, torchvision
from PIL import Image, ImageOps
from torch import nn
from torch.nn import functional as F
from torchvision.transforms import v2 as transforms

class UserError(Exception): ...  # a bad setting or file; the scripts print only its message
def check(condition, message):
    if not condition:
        raise UserError(message)

# 1. Config --------------------------------------------------------------------------------------------
def check_choices(cfg):
    for field in fields(cfg):
        value, allowed = getattr(cfg, field.name), get_args(field.type)  # () if no Literal
        check(not allowed or value in allowed, f'{field.name}={value} must be one of {allowed}')

@dataclass(frozen=True)
class TransformerConfig:  # one stack of blocks: vision encoder or language decoder
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    n_kv_head: int = 0           # key/value heads; fewer shrink the cache (grouped queries); 0 = n_head
    n_hidden: int = 0            # width inside the MLP; 0 = 4 * n_embd
    norm: Literal['layer', 'rms'] = 'layer'
    norm_eps: float = 1e-6
    activation: Literal['gelu', 'gelu_tanh', 'swiglu'] = 'gelu'
    position: Literal['learned', 'rope'] = 'learned'  # 'rope' in the decoder only
    rope_base: float = 10000.0
    bias: bool = True            # in linear layers and layer norms
    dropout: float = 0.0         # on the output of each attention and each MLP

    def __post_init__(self):
        check_choices(self)
        C, H, G = self.n_embd, self.n_head, self.n_kv_head or self.n_head
        divisible = min(C, H, G) > 0 and C % H == 0 and H % G == 0
        check(divisible, f'n_embd={C} must be divisible by n_head={H}, and n_head by n_kv_head={G}')
        check(self.position == 'learned' or (C // H) % 2 == 0, f'RoPE: n_embd/n_head={C // H} must be even')
        check(0 < self.n_layer < 200, f'n_layer={self.n_layer} must be in 1..199')  # sanity limit
        check(0 <= self.dropout < 1, f'dropout={self.dropout} must be in [0, 1)')

@dataclass(frozen=True)
class VLMConfig:  # the whole model, plus its image and prompt preprocessing
    vision: TransformerConfig = TransformerConfig()
    text: TransformerConfig = TransformerConfig()
    encoder: Literal['vit', 'resnet18', 'resnet50'] = 'vit'  # a ResNet ignores vision and stem
    stem: Literal['patch', 'conv'] = 'patch'  # one strided convolution, or conv_stem() (ViT only)
    image_size: int = 224        # pixels per side
    patch_size: int = 16         # pixels per side of a feature-grid cell
    image_mean: tuple = (0.5, 0.5, 0.5)  # pixels in [0, 1] are normalized with these
    image_std: tuple = (0.5, 0.5, 0.5)
    projection: Literal['linear', 'mlp', 'pixel_shuffle', 'perceiver'] = 'mlp'
    projection_hidden: int = 2048  # 'mlp': its hidden width
    shuffle_factor: int = 2      # 'pixel_shuffle': f x f cells become one visual token
    n_latents: int = 32          # 'perceiver': the number of visual tokens
    input_norm: bool = False     # each decoder input gets mean 0, std 1: small models learn sooner
    vocab_size: int = 50257
    block_size: int = 1024       # maximum sequence length: visual tokens and at least 16 of text
    tokenizer: str = 'bpe'       # see Tokenizer.make
    prompt_template: str = ' {}' # what the decoder reads; {} is replaced by the prompt
    answer_prefix: str = ' '     # goes before the answer; BPE learns words with their space: ' red'
    caption_prompt: str = ''     # the prompt that asks for a caption

    @property
    def grid(self):  # cells per side of the encoder's feature map
        return self.image_size // self.patch_size
    @property
    def factor(self):  # a visual token merges factor x factor cells
        return self.shuffle_factor if self.projection == 'pixel_shuffle' else 1
    @property
    def n_visual(self):  # visual tokens per image
        return self.n_latents if self.projection == 'perceiver' else (self.grid // self.factor) ** 2

    def __post_init__(self):
        check_choices(self)
        check(self.vision.position == 'learned', "position='rope' is for the decoder only")
        check(self.encoder == 'vit' or self.patch_size == 32, 'a ResNet needs patch_size=32')
        if self.encoder == 'vit' and self.stem == 'conv':
            check(self.patch_size == 8, "stem='conv' needs patch_size=8")
        P, side = self.image_size, self.patch_size * self.factor  # side of a visual token in pixels
        check(P >= side > 0 and P % side == 0, f'image_size={P} must be a multiple of {side}')
        check(self.prompt_template.count('{}') == 1, 'prompt_template must contain {} once')
        least = self.n_visual + 16
        check(self.block_size >= least, f'block_size={self.block_size} must be at least {least}')

SIGLIP_B = TransformerConfig(n_layer=12, n_head=12, n_embd=768, activation='gelu_tanh')
GPT2 = TransformerConfig(n_layer=12, n_head=12, n_embd=768, activation='gelu_tanh', norm_eps=1e-5)
LLAMA = TransformerConfig(norm='rms', norm_eps=1e-5, activation='swiglu', position='rope', bias=False)
SMOLLM2_135M = replace(LLAMA, n_layer=30, n_head=9, n_kv_head=3, n_embd=576, n_hidden=1536, rope_base=1e5)
SLIM = TransformerConfig(n_layer=4, n_head=8, n_embd=128, bias=False)  # 'small' has 4 heads
SHARED = dict(image_size=64, patch_size=8, stem='conv', projection='pixel_shuffle', input_norm=True)
PRESETS = {  # visual tokens (N,C): tiny and small (16,128), base (196,768), nanovlm (49,576)
    'tiny': VLMConfig(replace(SLIM, n_layer=1), SLIM, vocab_size=512, block_size=112, **SHARED),
    'small': VLMConfig(replace(SLIM, n_layer=1, n_head=4, dropout=0.1), replace(SLIM, n_head=4, dropout=0.1),
                       vocab_size=4096, block_size=160, **SHARED),
    'base': VLMConfig(SIGLIP_B, GPT2, tokenizer='gpt2'),
    'nanovlm': VLMConfig(SIGLIP_B, SMOLLM2_135M, projection='pixel_shuffle', vocab_size=49152,
                         tokenizer='HuggingFaceTB/cosmo2-tokenizer', prompt_template='Question: {} Answer:',
                         answer_prefix='', caption_prompt='What is this?',
                         image_mean=(0.0, 0.0, 0.0), image_std=(1.0, 1.0, 1.0)),
}

# 2. Blocks, shared by the vision encoder, the Perceiver and the language decoder ----------------------
def make_norm(cfg):
    if cfg.norm == 'rms':
        return nn.RMSNorm(cfg.n_embd, eps=cfg.norm_eps)  # weight * x / sqrt(mean(x^2) + eps)
    return nn.LayerNorm(cfg.n_embd, eps=cfg.norm_eps, bias=cfg.bias)

def rope_cos_sin(cfg, pos):
    """Cosine and sine of each channel pair's angle at the positions pos (B,L), or (1,L) for all rows."""
    D = cfg.n_embd // cfg.n_head
    frequency = cfg.rope_base ** (-torch.arange(0, D, 2, device=pos.device) / D)  # base^(-2i/D)
    angle = pos[:, None, :, None] * frequency  # (B,1,L,D/2); later pairs turn more slowly
    return torch.stack([angle.cos(), angle.sin()])  # (2,B,1,L,D/2)

def apply_rope(x, rope):
    """Rotary position embedding (arXiv 2104.09864): turns each channel pair (i, i + D/2) of x (B,heads,L,D)
    by its angle, so that q.k depends on relative positions only. (The paper pairs 2i and 2i + 1.)"""
    cos, sin = rope.to(x.dtype)  # each (B,1,L,D/2) or (1,1,L,D/2): all heads rotate alike
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

def attend(q, k, v, mask=None):
    """softmax(QK^T / sqrt(D)) V, spelled out. q (B,H,L,D), k and v (B,H,S,D), mask True where a query may
    attend -> values (B,H,L,D) and the attention map (B,H,L,S)."""
    att = (q / math.sqrt(q.size(-1))) @ k.transpose(-2, -1)  # (B,H,L,D) x (B,H,D,S) -> (B,H,L,S)
    if mask is not None:
        att = att + torch.where(mask, 0.0, float('-inf')).to(att.dtype)  # faster than masked_fill
    att = F.softmax(att, dim=-1)
    return att @ v, att  # (B,H,L,S) x (B,H,S,D) -> (B,H,L,D)

def avoid_fused_attention(q):  # slow backward pass in bf16 on CPUs; bugs on MPS before PyTorch 2.13
    slow_on_cpu = q.is_cpu and q.dtype == torch.bfloat16 and q.requires_grad
    return slow_on_cpu or (q.is_mps and torch.__version__ < (2, 13))  # TorchVersion compares with tuples

class KVCache:  # the keys (after RoPE) and values (B,G,S,D) that one layer has computed so far
    k = v = None  # none yet
    def update(self, k, v):  # appends the new keys and values, returns all of them
        if self.k is not None:
            k = torch.cat([self.k, k], dim=2)
            v = torch.cat([self.v, v], dim=2)
        self.k, self.v = k, v
        return k, v

class Attention(nn.Module):
    """Multi-head attention: each query scores the keys; the output is the softmax-weighted mean of values.
    Self- or cross-attention, causal or not, with grouped-query heads, RoPE and a KV cache."""
    def __init__(self, cfg, causal=False):
        super().__init__()
        n_kv_head = cfg.n_kv_head or cfg.n_head
        self.causal = causal
        self.head_dim = cfg.n_embd // cfg.n_head
        self.group_size = cfg.n_head // n_kv_head  # query heads that share a key/value head
        self.q = nn.Linear(cfg.n_embd, cfg.n_embd, bias=cfg.bias)
        self.k = nn.Linear(cfg.n_embd, n_kv_head * self.head_dim, bias=cfg.bias)
        self.v = nn.Linear(cfg.n_embd, n_kv_head * self.head_dim, bias=cfg.bias)
        self.out = nn.Linear(cfg.n_embd, cfg.n_embd, bias=cfg.bias)
        self.keep_map = False  # True: each forward stores its map in attn_map (B,H,L,S)
    def forward(self, x, context=None, mask=None, rope=None, cache=None):
        """Queries from x (B,L,C); keys and values from context (B,S,C) if given, else x. -> (B,L,C)
        mask (B,1,L,S), True where a query may attend, replaces the causal mask."""
        context = x if context is None else context
        q = self.q(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B,L,H,D) -> (B,H,L,D)
        k = self.k(context).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B,G,S,D)
        v = self.v(context).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B,G,S,D)
        if rope is not None:
            q, k = apply_rope(q, rope), apply_rope(k, rope)
        if cache is not None:
            assert cache.k is None or x.size(1) == 1, 'after the prompt, one token at a time'
            k, v = cache.update(k, v)  # adds the old ones: from here on S is all keys
        if self.group_size > 1:  # (B,G,S,D) -> (B,H,S,D)
            k = k.repeat_interleave(self.group_size, dim=1)
            v = v.repeat_interleave(self.group_size, dim=1)
        # one new token needs no mask: no key is in its future
        is_causal = x.size(1) > 1 and mask is None and self.causal
        if self.keep_map or avoid_fused_attention(q):
            if is_causal:  # several new tokens, so no old keys (see the assert): L = S
                mask = torch.ones(q.size(2), k.size(2), dtype=torch.bool, device=x.device).tril()
            y, att = attend(q, k, v, mask)
            self.attn_map = att.detach() if self.keep_map else None
        else:  # the same in one call, without a map
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)
        return self.out(y.transpose(1, 2).flatten(2))  # (B,H,L,D) -> (B,L,C)

class MLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        n_hidden = cfg.n_hidden or 4 * cfg.n_embd
        self.activation = cfg.activation
        self.up = nn.Linear(cfg.n_embd, n_hidden, bias=cfg.bias)
        self.down = nn.Linear(n_hidden, cfg.n_embd, bias=cfg.bias)
        if cfg.activation == 'swiglu':
            self.gate = nn.Linear(cfg.n_embd, n_hidden, bias=cfg.bias)
    def forward(self, x):
        if self.activation == 'swiglu':
            return self.down(F.silu(self.gate(x)) * self.up(x))  # the gate scales each channel
        approximate = 'tanh' if self.activation == 'gelu_tanh' else 'none'
        return self.down(F.gelu(self.up(x), approximate=approximate))

class Block(nn.Module):  # pre-norm residual block
    def __init__(self, cfg, causal=False):
        super().__init__()
        self.norm1 = make_norm(cfg)
        self.attn = Attention(cfg, causal)
        self.norm2 = make_norm(cfg)
        self.mlp = MLP(cfg)
        self.dropout = nn.Dropout(cfg.dropout)
    def forward(self, x, context=None, mask=None, rope=None, cache=None):
        x = x + self.dropout(self.attn(self.norm1(x), context, mask, rope, cache))  # mixes tokens
        return x + self.dropout(self.mlp(self.norm2(x)))  # transforms each token

class Transformer(nn.Module):  # blocks and a final norm
    def __init__(self, cfg, causal=False):
        super().__init__()
        self.blocks = nn.ModuleList([Block(cfg, causal) for _ in range(cfg.n_layer)])
        self.norm = make_norm(cfg)
        self.grad_checkpointing = False  # True: backward recomputes each block, to save memory
    def forward(self, x, context=None, mask=None, rope=None, caches=None):
        for i, block in enumerate(self.blocks):
            if self.grad_checkpointing and torch.is_grad_enabled() and caches is None:
                x = torch.utils.checkpoint.checkpoint(block, x, context, mask, rope, use_reentrant=False)
            else:
                x = block(x, context, mask, rope, caches[i] if caches else None)
        return self.norm(x)

# 3. Vision encoder ------------------------------------------------------------------------------------
def conv_stem(C):
    """(B,3,P,P) -> (B,C,P/8,P/8). Slower than one convolution, but needs far fewer training images."""
    layers = [nn.Conv2d(3, C // 4, kernel_size=4, stride=2, padding=1), nn.GELU()]  # to P/2
    for c_in, c_out in ((C // 4, C // 4), (C // 4, C // 2)):  # to P/4, then to P/8
        conv = nn.Conv2d(c_in, c_out, kernel_size=3, padding=1, bias=False)
        layers += [conv, nn.MaxPool2d(2), nn.BatchNorm2d(c_out), nn.GELU()]
    return nn.Sequential(*layers, nn.Conv2d(C // 2, C, kernel_size=3, padding=1))

class VisionEncoder(nn.Module):  # ViT (arXiv 2010.11929), no class token, as in SigLIP (2303.15343)
    def __init__(self, cfg):
        super().__init__()
        C, p = cfg.vision.n_embd, cfg.patch_size
        self.n_embd = C
        self.stem = conv_stem(C) if cfg.stem == 'conv' else nn.Conv2d(3, C, kernel_size=p, stride=p)
        self.position_embedding = nn.Parameter(0.02 * torch.randn(cfg.grid**2, C))
        self.transformer = Transformer(cfg.vision)
    def forward(self, images):
        """images (B,3,P,P), normalized -> features (B,grid*grid,C) in row-major order."""
        x = self.stem(images).flatten(2).transpose(1, 2)  # (B,C,grid,grid) -> (B,grid*grid,C)
        return self.transformer(x + self.position_embedding)

class ResNetEncoder(nn.Module):  # torchvision's, without final pooling and classifier
    def __init__(self, cfg, weights=None):
        super().__init__()
        resnet = torchvision.models.get_model(cfg.encoder, weights=weights)
        self.n_embd = resnet.fc.in_features
        self.layers = nn.Sequential(*list(resnet.children())[:-2])
    def forward(self, images):
        return self.layers(images).flatten(2).transpose(1, 2)  # same layout as VisionEncoder

# 4. Projection: from vision features to visual tokens of the decoder's width --------------------------
def pixel_shuffle(x, f):
    """Merges f x f cells into one (strictly, an unshuffle). (B,grid*grid,C) -> (B,g*g,f*f*C)"""
    B, n_cells, C = x.shape
    g = math.isqrt(n_cells) // f  # output cells per side
    x = x.view(B, g, f, g, f, C).transpose(2, 3)  # (B,row,di,col,dj,C) -> (B,row,col,di,dj,C)
    return x.reshape(B, g * g, f * f * C)

class MultimodalProjection(nn.Module):
    # to add one: list it in VLMConfig.projection, count its tokens (factor or n_visual), build and call it
    def __init__(self, cfg, n_embd):  # n_embd: the encoder's width
        super().__init__()
        self.kind, self.factor = cfg.projection, cfg.factor
        n_in, n_hidden, n_out = n_embd * cfg.factor**2, cfg.projection_hidden, cfg.text.n_embd
        if self.kind == 'mlp':  # as in LLaVA 1.5 (arXiv 2310.03744)
            self.proj = nn.Sequential(nn.Linear(n_in, n_hidden), nn.GELU(), nn.Linear(n_hidden, n_out))
        else:  # one linear map for the others; pixel_shuffle's has no bias, as in nanoVLM
            self.proj = nn.Linear(n_in, n_out, bias=self.kind != 'pixel_shuffle')
        if self.kind == 'perceiver':  # Flamingo's (2204.14198), but latents do not see each other
            self.norm = make_norm(cfg.text)  # for the features: a Block does not normalize its context
            self.latents = nn.Parameter(0.02 * torch.randn(cfg.n_latents, n_out))
            self.resampler = Transformer(replace(cfg.text, n_layer=2))  # not causal, no positions
    def forward(self, x):
        """Features (B,grid*grid,n_embd) -> visual tokens (B,N,C)."""
        if self.kind == 'pixel_shuffle':
            x = pixel_shuffle(x, self.factor)
        x = self.proj(x)
        if self.kind == 'perceiver':
            x = self.resampler(self.latents.expand(len(x), -1, -1), context=self.norm(x))  # (B,N,C)
        return x

# 5. Language decoder ----------------------------------------------------------------------------------
class LanguageDecoder(nn.Module):
    """GPT-2 or Llama (arXiv 2302.13971), by config. Takes embeddings, since visual tokens have no ids.
    input_norm: each visual or text embedding gets mean 0 and std 1, so small models learn sooner."""
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg.text  # a TransformerConfig; the whole model's cfg is a VLMConfig
        C = cfg.text.n_embd
        self.embedding = nn.Embedding(cfg.vocab_size, C)  # its weight is also the output head: tied
        self.input_norm = nn.LayerNorm(C, elementwise_affine=False) if cfg.input_norm else nn.Identity()
        if cfg.text.position == 'learned':
            std = 0.5 if cfg.input_norm else 0.02  # inputs of std 1 would drown out 0.02
            self.position_embedding = nn.Parameter(std * torch.randn(cfg.block_size, C))
        self.transformer = Transformer(cfg.text, causal=True)
    def head(self, h):
        return F.linear(h, self.embedding.weight)  # (...,C) -> (...,V): one dot product per id
    def forward(self, x, pos, mask=None, caches=None):
        """x (B,L,C) at positions pos (B,L), or (1,L) for all -> hidden states (B,L,C), ready for head."""
        x = self.input_norm(x)
        if self.cfg.position == 'learned':
            x = x + self.position_embedding[pos]
        rope = rope_cos_sin(self.cfg, pos) if self.cfg.position == 'rope' else None
        return self.transformer(x, mask=mask, rope=rope, caches=caches)

# 6. The whole model -----------------------------------------------------------------------------------
def packed_mask(positions, n_visual):
    """The mask for rows that pack several texts: each text sees only the image and itself.
    positions (B,T) count from 0 in each text -> mask (B,1,S,S), True where a query may attend."""
    text_number = (positions == 0).cumsum(dim=1)  # (B,T): positions 0 1 2 0 1 -> texts 1 1 1 2 2
    text_number = F.pad(text_number, (n_visual, 0))  # (B,S): 0 for the image
    query, key = text_number[:, :, None], text_number[:, None, :]  # (B,S,1) and (B,1,S)
    allowed = (key == 0) | (key == query)  # (B,S,S)
    return allowed.tril()[:, None]  # also causal

class MinimalVLM(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.vision = VisionEncoder(cfg) if cfg.encoder == 'vit' else ResNetEncoder(cfg)
        self.projection = MultimodalProjection(cfg, self.vision.n_embd)
        self.decoder = LanguageDecoder(cfg)
        self.init_weights()
    def init_weights(self):
        """Linear layers and embeddings as in GPT-2, but q and k of self-attention start equal: see below."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for stack in [module for module in self.modules() if isinstance(module, Transformer)]:
            for block in stack.blocks:
                for layer in (block.attn.out, block.mlp.down):  # these add to the residual stream
                    nn.init.normal_(layer.weight, std=0.02 / math.sqrt(2 * len(stack.blocks)))
        # q = Wx and k = Wy share one random W, entries of std 0.7/sqrt(C): W^T W is about 0.49 I, and q.k,
        # summed over heads, 0.49 x.y. Tokens attend to similar ones (arXiv 2305.09828): learned sooner.
        for attn in [*self.vision.modules(), *self.decoder.modules()]:  # not the Perceiver
            if isinstance(attn, Attention) and attn.group_size == 1:  # else q and k differ in shape
                nn.init.normal_(attn.k.weight, std=0.7 / math.sqrt(attn.k.in_features))
                attn.q.weight.data.copy_(attn.k.weight)

    def embed(self, images, ids):
        """Visual tokens, then text, (B,N+T,C). images: uint8 (B,3,P,P), (1,3,P,P) shared by all, or None."""
        x = self.decoder.embedding(ids)  # text, (B,T,C)
        if images is not None:
            pixels = images.to(x.dtype) / 255
            pixels = transforms.functional.normalize(pixels, self.cfg.image_mean, self.cfg.image_std)
            visual = self.projection(self.vision(pixels))  # (B,N,C) or (1,N,C)
            x = torch.cat([visual.expand(len(ids), -1, -1), x], dim=1)  # (B,N+T,C)
        check(0 < x.size(1) <= self.cfg.block_size, f'block_size={self.cfg.block_size} is too small')
        return x

    def forward(self, images, ids, targets=None, positions=None):
        """images and ids as for embed. targets (B,T): the next token after each id, or -100 where not scored.
        positions (B,T): index of each id in its own text (see collate); required when a row packs texts.
        -> (logits (B,T,V), None); with targets: (logits of the scored ids (n_scored,V), mean loss)."""
        x = self.embed(images, ids)  # (B,S,C)
        N = x.size(1) - ids.size(1)
        pos = torch.arange(x.size(1), device=x.device)[None]  # (1,S): 0 to S - 1
        mask = None
        if positions is not None:  # packed: pos restarts at N in each text, as if it were alone
            pos = torch.cat([pos[:, :N].expand(len(ids), -1), N + positions], dim=1)  # (B,S)
            mask = packed_mask(positions, N)
        h = self.decoder(x, pos, mask)[:, N:]  # (B,T,C), without the visual positions
        if targets is None:
            return self.decoder.head(h), None
        is_scored = targets != -100  # skip the head for unscored positions: V is large
        logits = self.decoder.head(h[is_scored]).float()
        return logits, F.cross_entropy(logits, targets[is_scored])

    @torch.inference_mode()
    def stream(self, images, ids, max_new_tokens=50, temperature=1.0, top_p=1.0, top_k=0, stop=-1):
        """Yields tokens (B,1) until all rows are done, or max_new_tokens or block_size is reached. images as
        for embed; ids (B,T): prompts of one length. A row that has produced stop (-1: never) repeats it."""
        x = self.embed(images, ids)
        caches = [KVCache() for _ in self.decoder.transformer.blocks]
        pos = torch.arange(x.size(1), device=x.device)[None]
        done = torch.zeros(len(ids), 1, dtype=torch.bool, device=ids.device)
        for _ in range(min(max_new_tokens, self.cfg.block_size - x.size(1))):
            h = self.decoder(x, pos, caches=caches)  # prefill; then one token at a time
            logits = self.decoder.head(h[:, -1])  # (B,V): the last state predicts what comes next
            token = sample_top_p(logits, top_p, temperature, top_k).masked_fill(done, stop)
            yield token
            done |= token == stop
            if done.all():
                return
            x = self.decoder.embedding(token)
            pos = pos[:, -1:] + 1
    def generate(self, images, ids, max_new_tokens=50, **options):  # -> (B,T+new): ids, then new
        return torch.cat([ids, *self.stream(images, ids, max_new_tokens, **options)], dim=1)

    @torch.inference_mode()
    def score(self, image, prompt, choices):
        """Log-probabilities (n,) of n choices (1-D ids, see encode_answer). image (3,P,P), prompt (T,)"""
        answers = nn.utils.rnn.pad_sequence(choices, batch_first=True, padding_value=-100)  # (n,A)
        ids = torch.cat([prompt.expand(len(choices), -1), answers.clamp(min=0)], dim=1)  # (n,T+A)
        logits, _ = self(image[None], ids[:, :-1])  # (n,T+A-1,V): each predicts the next token
        logits = logits[:, -answers.size(1) :].float()  # (n,A,V): the last A predict the answer
        return -F.cross_entropy(logits.mT, answers, reduction='none').sum(dim=1)  # -100 is skipped

    @classmethod
    def from_pretrained(cls, names, cfg=None):
        """Loads public weights. names: 'name' or 'encoder,decoder', each a repository, folder,
        alias or ResNet. Parts that no file covers keep random weights. cfg replaces the published one."""
        names = [name.strip() for name in names.split(',')]
        published = {}  # fields of VLMConfig
        for name in names:
            published |= read_config(name)  # refuses what is not supported
        model = cls(cfg or VLMConfig(**published))
        for name in names:
            if name.startswith('resnet'):
                check(model.cfg.encoder == name, f'{name} needs encoder={name}')
                model.vision = ResNetEncoder(model.cfg, weights='DEFAULT')
            else:
                load_weights(model, fetch(name, 'model.safetensors'))
        return model.eval()

# 7. Sampling ------------------------------------------------------------------------------------------
def sample_top_p(logits, p=1.0, temperature=1.0, top_k=0):
    """Nucleus sampling (arXiv 1904.09751): draws from the smallest set of most likely tokens whose total
    probability reaches p, after temperature (0: greedy) and top_k (0: off). logits (B,V) -> ids (B,1)"""
    check(temperature >= 0 and top_k >= 0, f'temperature={temperature}, top_k={top_k}: both must be >= 0')
    check(0 < p <= 1, f'top_p={p} must be in (0, 1]')
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits, ids = logits.float().sort(dim=-1, descending=True)
    logits = logits[..., : top_k or None]  # [: None] keeps all
    logits = (logits - logits[..., :1]) / max(temperature, 1e-30)  # all <= 0: no +inf, no nan
    probs = F.softmax(logits, dim=-1)
    if p < 1:
        before = probs.cumsum(dim=-1) - probs  # total probability of the likelier tokens
        probs = probs.masked_fill(before >= p, 0.0)  # keeps the token that crosses p
    return ids.gather(-1, torch.multinomial(probs, num_samples=1))  # a rank, then its id

# 8. Public weights and checkpoints --------------------------------------------------------------------
def read_table(text):
    """The columns as {header: {ours: theirs}}: VISION_NAMES['SigLIP']['norm'] is 'post_layernorm'."""
    ours, *columns = zip(*[line.split() for line in text.strip().splitlines()])  # rows to columns
    return {column[0]: dict(zip(ours[1:], column[1:])) for column in columns}

# Our layer names and a public file's: '#' is the block number, '-' means none. load_weights adds .weight or
# .bias, except to position_embedding. ':T' transposes the weight; ':0', ':1' and ':2' take the q, k and v
# third of one layer; ':T1' does both: GPT-2's k is the second third of h.#.attn.c_attn, transposed.
VISION_NAMES = read_table("""
ours                SigLIP                                 nanoVLM
stem                embeddings.patch_embedding             vision_encoder.patch_embedding.conv
position_embedding  embeddings.position_embedding.weight   vision_encoder.patch_embedding.position_embedding
blocks.#.norm1      encoder.layers.#.layer_norm1           vision_encoder.blocks.#.ln1
blocks.#.attn.q     encoder.layers.#.self_attn.q_proj      vision_encoder.blocks.#.attn.qkv_proj:0
blocks.#.attn.k     encoder.layers.#.self_attn.k_proj      vision_encoder.blocks.#.attn.qkv_proj:1
blocks.#.attn.v     encoder.layers.#.self_attn.v_proj      vision_encoder.blocks.#.attn.qkv_proj:2
blocks.#.attn.out   encoder.layers.#.self_attn.out_proj    vision_encoder.blocks.#.attn.out_proj
blocks.#.norm2      encoder.layers.#.layer_norm2           vision_encoder.blocks.#.ln2
blocks.#.mlp.up     encoder.layers.#.mlp.fc1               vision_encoder.blocks.#.mlp.fc1
blocks.#.mlp.down   encoder.layers.#.mlp.fc2               vision_encoder.blocks.#.mlp.fc2
norm                post_layernorm                         vision_encoder.layer_norm
""")
TEXT_NAMES = read_table("""
ours                GPT-2                  Llama                                nanoVLM
embedding           wte                    embed_tokens                         decoder.token_embedding
position_embedding  wpe.weight             -                                    -
blocks.#.norm1      h.#.ln_1               layers.#.input_layernorm             decoder.blocks.#.norm1
blocks.#.attn.q     h.#.attn.c_attn:T0     layers.#.self_attn.q_proj            decoder.blocks.#.attn.q_proj
blocks.#.attn.k     h.#.attn.c_attn:T1     layers.#.self_attn.k_proj            decoder.blocks.#.attn.k_proj
blocks.#.attn.v     h.#.attn.c_attn:T2     layers.#.self_attn.v_proj            decoder.blocks.#.attn.v_proj
blocks.#.attn.out   h.#.attn.c_proj:T      layers.#.self_attn.o_proj            decoder.blocks.#.attn.out_proj
blocks.#.norm2      h.#.ln_2               layers.#.post_attention_layernorm    decoder.blocks.#.norm2
blocks.#.mlp.up     h.#.mlp.c_fc:T         layers.#.mlp.up_proj                 decoder.blocks.#.mlp.up_proj
blocks.#.mlp.gate   -                      layers.#.mlp.gate_proj               decoder.blocks.#.mlp.gate_proj
blocks.#.mlp.down   h.#.mlp.c_proj:T       layers.#.mlp.down_proj               decoder.blocks.#.mlp.down_proj
norm                ln_f                   norm                                 decoder.norm
""")
# (part, table): a file covers a part if it has the .weight of its table's last row. MP: nanoVLM's projection
LAYOUTS = [('vision', table) for table in VISION_NAMES.values()]
LAYOUTS += [('decoder', table) for table in TEXT_NAMES.values()] + [('projection', {'proj': 'MP.proj'})]
PREFIX = r'^(transformer|vision_model|model)\.'  # some files put it before each name
# ignored tensors: SigLIP's text half, scale, bias and pooling head, GPT-2's masks, RoPE tables
UNUSED = r'text_model\..*|logit_\w+|head\..*|.*\.attn\.(masked_)?bias|.*inv_freq'

# what a config.json calls the fields of TransformerConfig (upper table) and of VLMConfig (lower table)
STACK_FIELDS = read_table("""
ours        siglip               gpt2                llama                nanovlm-text   nanovlm-vision
n_layer     num_hidden_layers    n_layer             num_hidden_layers    lm_n_blocks    vit_n_blocks
n_head      num_attention_heads  n_head              num_attention_heads  lm_n_heads     vit_n_heads
n_embd      hidden_size          n_embd              hidden_size          lm_hidden_dim  vit_hidden_dim
n_hidden    intermediate_size    n_inner             intermediate_size    lm_inter_dim   vit_inter_dim
norm_eps    layer_norm_eps       layer_norm_epsilon  rms_norm_eps         lm_rms_eps     vit_ln_eps
n_kv_head   -                    -                   num_key_value_heads  lm_n_kv_heads  -
rope_base   -                    -                   rope_theta           lm_re_base     -
""")
MODEL_FIELDS = read_table("""
ours        siglip               gpt2                llama                    nanovlm
image_size  image_size           -                   -                        vit_img_size
patch_size  patch_size           -                   -                        vit_patch_size
vocab_size  -                    vocab_size          vocab_size               lm_vocab_size
block_size  -                    n_positions         max_position_embeddings  -
tokenizer   -                    -                   -                        lm_tokenizer
""")
SUPPORTED = dict(  # keys of a config.json that must have this value, if present
    siglip=dict(hidden_act='gelu_pytorch_tanh'), nanovlm=dict(mp_pixel_shuffle_factor=2),
    gpt2=dict(activation_function='gelu_new', scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False),
    llama=dict(hidden_act='silu', attention_bias=False, mlp_bias=False, rope_scaling=None,
               rope_type='default', tie_word_embeddings=True))
ALIASES = {'siglip-b-16': 'google/siglip-base-patch16-224', 'gpt2': 'openai-community/gpt2',
           'smollm2-135m': 'HuggingFaceTB/SmolLM2-135M', 'nanovlm-222m': 'lusxvr/nanoVLM-222M'}

def fetch(name, file):
    """Path of a file in a folder, or in a Hugging Face repository, from which it is downloaded once."""
    if os.path.isdir(os.path.expanduser(name)):
        return os.path.join(os.path.expanduser(name), file)
    repository = ALIASES.get(name, name)
    valid = re.fullmatch(r'\w[\w.-]*/\w[\w.-]*', repository)
    check(valid, f'{name} is not a folder, an owner/name repository or one of {list(ALIASES)}')
    url = f'{os.environ.get("HF_ENDPOINT", "https://huggingface.co")}/{repository}/resolve/main/{file}'
    path = os.path.join(torch.hub.get_dir(), 'vlm', repository, file)
    if os.path.exists(path):
        return path
    def show(blocks, size, total):  # called for each block; reports every 5% of a large file
        if total > 10**7 and blocks % (total // size // 20) == 0:
            print(f'{url}: {blocks * size / 1e6:.0f} of {total / 1e6:.0f} MB', file=sys.stderr)
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        part, _ = urllib.request.urlretrieve(url, f'{path}.{os.getpid()}', show)
        os.replace(part, path)
    except (OSError, ValueError) as e:  # ContentTooShortError is an OSError
        raise UserError(f'cannot download {url} ({e}): save it yourself (one file, no shards) to '
                        f'{path}, or train your own model: python train.py') from e
    return path

def read_json(path):
    try:
        with open(path, encoding='utf-8') as f:
            return dict(json.load(f))
    except (OSError, ValueError, TypeError, RecursionError) as e:
        raise UserError(f'{path} cannot be read as a JSON object ({e})') from e

def read_config(name):
    """VLMConfig fields that a published model fixes, defaults included; train.py puts them over a preset."""
    image_fields = dict(encoder='vit', stem='patch', image_size=224, patch_size=16)
    image_fields |= dict(image_mean=(0.5, 0.5, 0.5), image_std=(0.5, 0.5, 0.5))
    if name.startswith('resnet'):
        image_fields |= dict(image_mean=(0.485, 0.456, 0.406), image_std=(0.229, 0.224, 0.225))
        return image_fields | dict(encoder=name, patch_size=32, projection='mlp')  # 7 x 7 cells
    path = fetch(name, 'config.json')
    config = dict(rms_norm_eps=1e-6) | read_json(path)  # 1e-6: if a Llama omits it
    kind = str(config.get('model_type', 'nanovlm')).removesuffix('_vision_model')  # SigLIP's vision half
    check(kind in SUPPORTED, f'{path}: model_type={kind} must be one of {", ".join(SUPPORTED)}')
    config |= config.get('vision_config') or {}  # in a full SigLIP's config
    config |= config.get('rope_parameters') or {}  # in a newer Llama's
    for key, value in SUPPORTED[kind].items():
        check(config.get(key, value) == value, f'{path}: {key}={config.get(key)} must be {value}')
    def fields_of(names):  # config's values under our names ('-' is no key of config)
        return {ours: config[key] for ours, key in names.items() if config.get(key) is not None}
    if kind == 'siglip':
        vision = replace(SIGLIP_B, **fields_of(STACK_FIELDS['siglip']))
        return image_fields | fields_of(MODEL_FIELDS['siglip']) | dict(vision=vision)
    if kind == 'nanovlm':
        vision = replace(SIGLIP_B, **fields_of(STACK_FIELDS['nanovlm-vision']))
        text = replace(LLAMA, **fields_of(STACK_FIELDS['nanovlm-text']))
        return vars(PRESETS['nanovlm']) | fields_of(MODEL_FIELDS['nanovlm']) | dict(vision=vision, text=text)
    text = replace(GPT2 if kind == 'gpt2' else LLAMA, **fields_of(STACK_FIELDS[kind]))
    defaults = dict(vocab_size=50257, block_size=1024, tokenizer=name, input_norm=False)
    return defaults | fields_of(MODEL_FIELDS[kind]) | dict(text=text)

def read_safetensors(path):
    """{name: tensor}, memory-mapped, copy-on-write. Layout: 8-byte header length, JSON header, data."""
    dtypes = dict(F32=torch.float32, F16=torch.float16, BF16=torch.bfloat16)
    dtypes |= dict(F64=torch.float64, I64=torch.int64, U8=torch.uint8, BOOL=torch.bool)
    try:
        with open(path, 'rb') as f:
            data = memoryview(mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY))
        start = 8 + int.from_bytes(data[:8], 'little')
        entries = json.loads(bytes(data[8:start]))
        entries.pop('__metadata__', None)
        tensors = {}
        for name, entry in entries.items():
            first, end = entry['data_offsets']
            check(0 <= first <= end <= len(data) - start, f'{path} is not a complete file')
            raw = torch.frombuffer(data[start + first : start + end], dtype=dtypes[entry['dtype']])
            tensors[name] = raw.view(entry['shape'])
        return tensors
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError) as e:
        raise UserError(f'{path} is not a complete .safetensors file of known dtypes ({e!r})') from e

def load_weights(model, path):
    """Loads each part of the model that the file covers; leaves the others as they are."""
    tensors = {re.sub(PREFIX, '', name): x for name, x in read_safetensors(path).items()}
    heads = [tensors.pop(name) for name in ('lm_head.weight', 'decoder.head.weight') if name in tensors]
    if heads and 'decoder.norm.weight' in tensors:  # nanoVLM may store the tied matrix as head only
        tensors.setdefault('decoder.token_embedding.weight', heads[0])
    used = set()
    for part, table in LAYOUTS:
        if list(table.values())[-1] + '.weight' not in tensors:  # the file does not cover part
            continue
        for name, parameter in getattr(model, part).named_parameters():
            # for example transformer.blocks.3.attn.k.weight, from a GPT-2 file:
            number = name.partition('blocks.')[2].partition('.')[0]  # '3'; '' outside the blocks
            row = name.removeprefix('transformer.').replace(f'blocks.{number}.', 'blocks.#.')
            row, suffix = os.path.splitext(row)  # 'blocks.#.attn.k', '.weight'; '' for positions
            theirs, _, how = table.get(row, '-').partition(':')  # 'h.#.attn.c_attn', ':', 'T1'
            theirs = theirs.replace('#', number) + suffix  # 'h.3.attn.c_attn.weight'
            check(theirs in tensors, f'{path} has no tensor for {part}.{name} ({theirs})')
            tensor = tensors[theirs]
            if 'T' in how and suffix == '.weight':
                tensor = tensor.T
            if how and how[-1] in '012':
                tensor = tensor.chunk(3)[int(how[-1])]
            if name == 'position_embedding':
                tensor = fit_positions(tensor.flatten(0, -2), len(parameter), part)  # some have (1,n,C)
            check(tensor.shape == parameter.shape, f'{path}: {theirs} is not {list(parameter.shape)}')
            parameter.data.copy_(tensor)
            used.add(theirs)
    extra = [name for name in tensors if name not in used and not re.fullmatch(UNUSED, name)]
    check(used and not extra, f'{path}: unsupported layout, or unexpected tensors: {extra[:3]}')
    tied = all(torch.equal(head.float(), model.decoder.embedding.weight) for head in heads)
    check(tied, f'{path}: its output head differs from its embedding: not supported')

def fit_positions(x, n, part):
    """Resizes position embeddings to (n,C): interpolated for vision, truncated for the decoder."""
    if part == 'decoder' or len(x) == n:
        return x[:n]
    grid = x.float().T.unflatten(1, (math.isqrt(len(x)), -1))[None]  # (1,C,side,side)
    return F.interpolate(grid, size=math.isqrt(n), mode='bicubic').flatten(2)[0].T

def save_checkpoint(path, model, tokenizer, **extra):
    """Atomic: writes to path.part, then renames it."""
    state = dict(model=model.state_dict(), config=asdict(model.cfg), tokenizer=tokenizer.state)
    try:
        with open(path + '.part', 'wb') as f:
            torch.save(state | extra, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(path + '.part', path)
    except (OSError, RuntimeError) as e:
        raise UserError(f'could not write {path} (disk full? {e}); any previous file is unchanged') from e

def load_checkpoint(path, device='cpu'):
    """-> model, tokenizer, and a dict of the extras. Never executes code from the file."""
    check(os.path.isfile(path), f'no checkpoint at {path}: run `python train.py` to create one')
    try:
        state = torch.load(path, map_location='cpu', weights_only=True)
        cfg = state.pop('config')
        cfg |= {part: TransformerConfig(**cfg[part]) for part in ('vision', 'text')}
        with torch.device('meta'):  # no allocation: the tensors of the file become the model's
            model = MinimalVLM(VLMConfig(**cfg))
        model.load_state_dict(state.pop('model'), assign=True)
        tokenizer = Tokenizer(**state.pop('tokenizer'))
    except Exception as e:  # a damaged or foreign file can fail in any way
        raise UserError(f'{path} is damaged or outdated: {" ".join(repr(e).split())[:300]}') from e
    return model.to(device).eval(), tokenizer, state

# 9. Tokenizers ----------------------------------------------------------------------------------------
END = '<|endoftext|>'
# how text is split before BPE. PIECES: each digit alone, no space with it: 'in 24' -> 'in', ' ', '2', '4'
PIECES = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"
GPT2_PIECES = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

class Tokenizer:
    """Byte-level BPE: text <-> ids. The pair that makes the token of the lowest id merges first.
    tokens: {token: id}; a token is its bytes read as latin-1: one character, chr(byte), per byte."""
    def __init__(self, name, tokens, special, pieces=PIECES):
        self.state = dict(name=name, tokens=tokens, special=special, pieces=pieces)
        self.name = name
        self.bytes = {i: token.encode('latin-1') for token, i in tokens.items()}
        ranks = {token: i for i, token in self.bytes.items()}
        encoding = tiktoken.Encoding(name, pat_str=pieces, mergeable_ranks=ranks, special_tokens=special)
        self.encode = encoding.encode_ordinary  # text -> ids
        self.vocab_size = encoding.n_vocab
        self.end = special[END]

    def decode(self, ids):
        return ''.join(self.stream(ids))
    def stream(self, ids):
        """Text piece by piece, without special tokens; incomplete characters are held back."""
        decoder = codecs.getincrementaldecoder('utf-8')(errors='replace')
        for i in ids:
            yield decoder.decode(self.bytes.get(int(i), b''))
        yield decoder.decode(b'', final=True)

    @classmethod
    def make(cls, name, texts=(), vocab_size=257):  # 256 bytes and END
        """name: 'bytes', 'bpe' (learned from texts), a .json file, or a folder or repository with one."""
        if name in ('bytes', 'bpe'):
            tokens = learn_bpe(texts if name == 'bpe' else [], vocab_size - 1)
            return cls(name, tokens, {END: len(tokens)})
        path = os.path.expanduser(name) if name.endswith('.json') else fetch(name, 'tokenizer.json')
        data = read_json(path)
        model = data.get('model') or {}
        check('added_tokens' in data and {'vocab', 'merges'} <= {*model}, f'{path} is not a BPE tokenizer')
        special = {t['content']: t['id'] for t in data['added_tokens']}
        pre = data.get('pre_tokenizer') or {}
        steps = pre.get('pretokenizers', [pre])  # a sequence, or a single step
        kinds = ' '.join(step.get('type', '') for step in steps)  # such as 'Digits ByteLevel'
        pieces = {'ByteLevel': GPT2_PIECES, 'Digits ByteLevel': PIECES}.get(kinds)
        check(pieces and not data.get('normalizer'), f'{path}: unsupported pre-tokenizer or normalizer')
        supported = dict(add_prefix_space=False, use_regex=True, individual_digits=True)  # if present
        for step in steps:
            for key, value in supported.items():
                check(step.get(key, value) == value, f'{path}: unsupported pre-tokenizer ({key})')
        # tiktoken merges by id, so ids must rise in merge order; -1, for a missing token, breaks the order
        joined = [m.replace(' ', '') if isinstance(m, str) else ''.join(m) for m in model['merges']]
        ids = [0] + [model['vocab'].get(token, -1) for token in joined]  # 0: catches a first -1
        check(END in special and ids == sorted(ids), f'{path}: no {END}, or ids not in merge order')
        # GPT-2 writes printable bytes as themselves, the n-th other byte as chr(256 + n); here back
        alphabet = {256 + n: byte for n, byte in enumerate([*range(33), *range(127, 161), 173])}
        tokens = {t.translate(alphabet): i for t, i in model['vocab'].items() if t not in special}
        return cls(name, tokens, special, pieces)

def learn_bpe(texts, n_tokens):
    """BPE (arXiv 1508.07909): repeatedly joins the most frequent pair of adjacent tokens into a new one."""
    # PIECES, approximated: re has no \p{L} and \p{N}, so here '½' counts as a letter
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?[^\W\d_]+|\d| ?(?:[^\w\s]|_)+|\s+(?=\d)|\s+(?!\S)|\s+"
    pieces = Counter(piece for text in texts for piece in re.findall(pattern, text))
    counts = list(pieces.values())  # how often each piece occurs in the texts
    # pieces as tokens in brackets (not in latin-1), so that replace() joins whole tokens: ‹c›‹a›‹t›
    words = [''.join(f'‹{chr(b)}›' for b in piece.encode('utf-8', 'replace')) for piece in pieces]
    pairs = Counter()  # (left, right) -> how often they are neighbors in the texts
    def add_pairs(word, n):
        parts = word[1:-1].split('›‹')  # ['c', 'a', 't']
        for pair in zip(parts, parts[1:]):
            pairs[pair] += n
    for word, n in zip(words, counts):
        add_pairs(word, n)
    tokens = {chr(b): b for b in range(256)}  # token -> id
    while pairs and len(tokens) < n_tokens:
        (left, right), most = pairs.most_common(1)[0]
        if most < 2:
            break
        tokens[left + right] = len(tokens)  # new: ab is joined everywhere, so no a+bc makes abc
        apart, joined = f'‹{left}›‹{right}›', f'‹{left}{right}›'
        for i, word in enumerate(words):
            if apart in word:
                add_pairs(word, -counts[i])
                words[i] = word.replace(apart, joined)
                add_pairs(words[i], counts[i])
    return tokens

# 10. Images and batches -------------------------------------------------------------------------------
def open_image(path, size):
    """An image file as 8-bit RGB, upright. A JPEG may be decoded smaller, but never below size."""
    try:  # opened here, not by Pillow: given a path, Pillow 13 can misrotate a TIFF
        with open(path, 'rb') as f, warnings.catch_warnings(action='ignore'), Image.open(f) as image:
            image.draft('RGB', (size, size))
            return to_rgb(image)
    except Exception as e:  # broken files make Pillow raise almost anything
        raise UserError(f'{path} is not a readable image ({e!r})') from e

def to_rgb(image):
    """Any Pillow image as 8-bit RGB: upright per EXIF, scaled down to 8 bits, composited on white."""
    image.load()  # decode now: the suppress() below would hide a broken file
    with contextlib.suppress(Exception):  # ignore broken EXIF data
        image = ImageOps.exif_transpose(image)
    if image.mode[0] in 'IF':  # over 8 bits, or floats: their white is guessed from the maximum
        image = image.convert('F')
        high = image.getextrema()[1]
        white = next((w for w in (1, 255, 65535) if w >= high), high)  # floats, 8 bits, 16 bits
        image = image.point(lambda v: v * (255 / white)).convert('L')
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image.convert('RGBA'))
    return image.convert('RGB')

def image_transform(cfg):  # RGB image -> uint8 (3,P,P), squashed to a square; embed normalizes
    return transforms.Compose([transforms.Resize([cfg.image_size] * 2), transforms.PILToTensor()])

def encode_prompt(tokenizer, cfg, prompt):
    """Ids of the template filled with prompt (default: caption_prompt), or just END if both are empty."""
    prompt = prompt.strip() or cfg.caption_prompt
    if not prompt:
        return [tokenizer.end]
    ids = tokenizer.encode(cfg.prompt_template.replace('{}', prompt))
    return ids[-((cfg.block_size - cfg.n_visual) // 2) :]  # the last ids, within half the text room

def encode_answer(tokenizer, cfg, answer):
    return tokenizer.encode(cfg.answer_prefix + answer.strip()) + [tokenizer.end]

def collate(items, cfg, tokenizer, transform):
    """[(image, [(prompt, answer), ...]), ...] -> images (B,3,P,P); ids, targets and positions (B,T).
    A row holds all texts of an image, cut to fit block_size. positions is None if no row has several texts.
        ids        what  color  red  shape  star    the texts 'what color red' and 'shape star'
        targets    -100  red    END  star   END     shifted within each text, not across; -100: not scored
        positions  0     1      2    0      1       count from 0 in each text"""
    rows = []
    for _, texts in items:
        row = []  # (id, target, position) of each token
        for prompt, answer in texts:
            prompt_ids = encode_prompt(tokenizer, cfg, prompt)
            answer_ids = encode_answer(tokenizer, cfg, answer)
            ids = (prompt_ids + answer_ids)[:-1]  # nothing follows END
            targets = [-100] * (len(prompt_ids) - 1) + answer_ids
            row += zip(ids, targets, range(len(ids)))
        rows.append(row[: cfg.block_size - cfg.n_visual])
    longest = max(map(len, rows))
    rows = [row + [(0, -100, 0)] * (longest - len(row)) for row in rows]  # position 0 hides pads
    ids, targets, positions = torch.tensor(rows).unbind(-1)  # (B,T,3) -> three times (B,T)
    packed = any(len(texts) > 1 for _, texts in items)
    images = torch.stack([transform(image) for image, _ in items])
    return images, ids, targets, (positions if packed else None)

# 11. Command line -------------------------------------------------------------------------------------
def override(settings, argv=None):
    """Overrides settings, the globals() of a script, by --name=value, --name value or a bare --flag.
    A setting is a line `seed = 1337  # help` (note the two spaces); its default also sets its type."""
    def true_or_false(text):
        return bool(json.loads(text.lower()))
    with open(settings['__file__'], encoding='utf-8') as f:
        comments = dict(re.findall(r'^([a-z]\w*) = .*?  # (.*)$', f.read(), re.M))
    parser = argparse.ArgumentParser(usage='%(prog)s [--name=value ...]', description=settings['__doc__'],
                                     formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    for name, comment in comments.items():
        options = dict(type=type(settings[name]), default=settings[name])
        if options['type'] is bool:  # bool('False') is True
            options.update(type=true_or_false, nargs='?', const=True)
        parser.add_argument(f'--{name}', help=comment.replace('%', '%%'), **options)
    values, unknown = parser.parse_known_args(argv)
    if unknown:
        close = difflib.get_close_matches(unknown[0].split('=')[0], [f'--{name}' for name in comments], n=1)
        parser.error(f'unknown setting {unknown[0]}' + (f': did you mean {close[0]}?' if close else ''))
    settings.update(vars(values))
    return vars(values)
