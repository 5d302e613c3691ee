"""A Llama in NumPy float64 with hand-derived gradients: the tests' independent oracle.

Every `f_backward` takes `grad`, the derivative of the loss with respect to the output of `f`, then
the arguments of `f`, and returns the derivatives with respect to its float inputs, in order. It
recomputes what it needs: slower than caching, but each pair can be checked on its own.
"""

import numpy as np

Weights = dict[str, np.ndarray]  # Hugging Face checkpoint name -> float64 array

LAYER_NAMES = (
    "input_layernorm.weight",
    *(f"self_attn.{name}_proj.weight" for name in "qkvo"),
    "post_attention_layernorm.weight",
    *(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
)


def linear(x, weight):
    """[..., in], [out, in] -> [..., out]."""
    return x @ weight.T


def linear_backward(grad, x, weight):
    grad_rows = grad.reshape(-1, grad.shape[-1])  # [batch * seq, out]
    return grad @ weight, grad_rows.T @ x.reshape(-1, x.shape[-1])


def rms_norm(x, weight, epsilon):
    """[..., hidden], [hidden] -> [..., hidden]. RMSNorm, arXiv:1910.07467, section 3."""
    return weight * x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + epsilon)


def rms_norm_backward(grad, x, weight, epsilon):
    """For r = 1 / sqrt(mean(x²) + epsilon) and u = x r: dr/dx_j = -r² u_j / hidden.

    Hence, with g = grad * weight: dL/dx_j = r (g_j - u_j mean(g u)).
    """
    r = 1 / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + epsilon)  # [..., 1]
    u, g = x * r, grad * weight
    grad_x = r * (g - u * np.mean(g * u, axis=-1, keepdims=True))
    return grad_x, (grad * u).reshape(-1, x.shape[-1]).sum(axis=0)


def inverse_frequencies(config) -> np.ndarray:
    """Radians per position of each rotated pair: [head_dim / 2].

    RoPE, arXiv:2104.09864, section 3.2.2. The "llama3" type keeps the pairs that turn often
    within the original context, slows by `factor` those that hardly turn, and blends in between:
    the "NTK-by-parts" rule of YaRN, arXiv:2309.00071, section 3.2.
    """
    rope = config.rope_parameters
    pairs = np.arange(config.head_dim // 2, dtype=np.float64)
    frequencies = rope["rope_theta"] ** (-2 * pairs / config.head_dim)
    if rope["rope_type"] == "default":
        return frequencies
    if rope["rope_type"] != "llama3":
        raise ValueError(f"unknown rope_type: {rope['rope_type']}")
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    # wavelength > original / low means turns < low, so clipping yields all three regimes.
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * np.pi)
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return kept * frequencies + (1 - kept) * frequencies / rope["factor"]


def rotary_tables(config, positions):
    """Cosines and sines of every angle, each [seq, 1, head_dim], for positions [seq]."""
    angles = np.outer(positions, inverse_frequencies(config))  # [seq, head_dim / 2]
    angles = np.concatenate([angles, angles], axis=-1)[:, None, :]  # the 1 stands for heads
    return np.cos(angles), np.sin(angles)


def rotate(x, cosines, sines):
    """Turns the pairs (x_j, x_{j + head_dim/2}) of x [batch, seq, heads, head_dim].

    RoPE, arXiv:2104.09864, section 3.4.2, except that the paper pairs neighbours (x_2j, x_2j+1):
    Hugging Face checkpoints have the rows of q_proj and k_proj permuted to pair the two halves.
    """
    first, second = np.split(x, 2, axis=-1)
    return x * cosines + np.concatenate([-second, first], axis=-1) * sines


def rotate_backward(grad, cosines, sines):
    """The transpose of a rotation is the opposite rotation, whatever x was."""
    return rotate(grad, cosines, -sines)


def grouped(q, kv_heads):
    """[batch, seq, heads, head_dim] -> [batch, seq, kv_heads, group, head_dim]."""
    return q.reshape(*q.shape[:2], kv_heads, -1, q.shape[-1])


def attention_probabilities(q, k):
    """Softmax over the keys <= query: [batch, kv_heads, group, seq (query), seq (key)].

    Subscripts: b batch, q query, k key, n kv head, g query head within n's group, d head_dim.
    """
    scores = np.einsum("bqngd,bknd->bngqk", grouped(q, k.shape[2]), k) / np.sqrt(q.shape[-1])
    scores = np.where(np.tri(q.shape[1], dtype=bool), scores, -np.inf)
    # Subtracting the maximum changes nothing mathematically and keeps exp from overflowing.
    exponentials = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def attention(q, k, v):
    """q [batch, seq, heads, head_dim], k and v [batch, seq, kv_heads, head_dim] -> like q.

    Each kv head serves `group` consecutive query heads: GQA, arXiv:2305.13245, section 2.2.
    """
    return np.einsum("bngqk,bknd->bqngd", attention_probabilities(q, k), v).reshape(q.shape)


def attention_backward(grad, q, k, v):
    """For p = softmax(s): dp_i/ds_j = p_i ([i = j] - p_j), which is 0 for a masked s_j too.

    The gradients of k and v sum over the query heads of their group.
    """
    p, grad = attention_probabilities(q, k), grouped(grad, k.shape[2])
    grad_v = np.einsum("bngqk,bqngd->bknd", p, grad)
    grad_p = np.einsum("bqngd,bknd->bngqk", grad, v)
    grad_s = p * (grad_p - np.sum(grad_p * p, axis=-1, keepdims=True)) / np.sqrt(q.shape[-1])
    grad_q = np.einsum("bngqk,bknd->bqngd", grad_s, k).reshape(q.shape)
    grad_k = np.einsum("bngqk,bqngd->bknd", grad_s, grouped(q, k.shape[2]))
    return grad_q, grad_k, grad_v


def rotated_heads(x, w_q, w_k, w_v, rotary):
    """x [batch, seq, hidden] -> q [batch, seq, heads, head_dim], k and v with kv_heads."""
    by_head = (*x.shape[:2], -1, rotary[0].shape[-1])
    q, k, v = (linear(x, weight).reshape(by_head) for weight in (w_q, w_k, w_v))
    return rotate(q, *rotary), rotate(k, *rotary), v


def self_attention(x, w_q, w_k, w_v, w_o, rotary):
    """[batch, seq, hidden] -> [batch, seq, hidden]; `rotary` is (cosines, sines)."""
    heads = attention(*rotated_heads(x, w_q, w_k, w_v, rotary))
    return linear(heads.reshape(*x.shape[:2], -1), w_o)


def self_attention_backward(grad, x, w_q, w_k, w_v, w_o, rotary):
    joined = (*x.shape[:2], -1)  # [batch, seq, heads * head_dim]
    q, k, v = rotated_heads(x, w_q, w_k, w_v, rotary)
    grad_heads, grad_w_o = linear_backward(grad, attention(q, k, v).reshape(joined), w_o)
    grad_q, grad_k, grad_v = attention_backward(grad_heads.reshape(q.shape), q, k, v)
    grad_q, grad_k = rotate_backward(grad_q, *rotary), rotate_backward(grad_k, *rotary)
    from_q, grad_w_q = linear_backward(grad_q.reshape(joined), x, w_q)
    from_k, grad_w_k = linear_backward(grad_k.reshape(joined), x, w_k)
    from_v, grad_w_v = linear_backward(grad_v.reshape(joined), x, w_v)
    return from_q + from_k + from_v, grad_w_q, grad_w_k, grad_w_v, grad_w_o


def sigmoid(z):
    """Elementwise. This form of 1 / (1 + exp(-z)) never overflows."""
    return 0.5 * (1 + np.tanh(z / 2))


def mlp(x, w_gate, w_up, w_down):
    """[batch, seq, hidden] -> same. SwiGLU, arXiv:2002.05202, section 2; silu(z) = z sigmoid(z)."""
    gate, up = linear(x, w_gate), linear(x, w_up)  # [batch, seq, intermediate]
    return linear(gate * sigmoid(gate) * up, w_down)


def mlp_backward(grad, x, w_gate, w_up, w_down):
    """For s = sigmoid(z): silu'(z) = s + z s (1 - s)."""
    gate, up = linear(x, w_gate), linear(x, w_up)  # [batch, seq, intermediate]
    s = sigmoid(gate)
    grad_product, grad_w_down = linear_backward(grad, gate * s * up, w_down)
    grad_gate, grad_up = grad_product * up * (s + gate * s * (1 - s)), grad_product * gate * s
    from_gate, grad_w_gate = linear_backward(grad_gate, x, w_gate)
    from_up, grad_w_up = linear_backward(grad_up, x, w_up)
    return from_gate + from_up, grad_w_gate, grad_w_up, grad_w_down


def block(x, layer, epsilon, rotary):
    """[batch, seq, hidden] -> same; `layer` holds the weights in the order of LAYER_NAMES."""
    norm_1, w_q, w_k, w_v, w_o, norm_2, w_gate, w_up, w_down = layer
    x = x + self_attention(rms_norm(x, norm_1, epsilon), w_q, w_k, w_v, w_o, rotary)
    return x + mlp(rms_norm(x, norm_2, epsilon), w_gate, w_up, w_down)


def block_backward(grad, x, layer, epsilon, rotary):
    """Each `grad +` is the residual path, along which the gradient passes unchanged."""
    norm_1, w_q, w_k, w_v, w_o, norm_2, w_gate, w_up, w_down = layer
    normed_1 = rms_norm(x, norm_1, epsilon)
    middle = x + self_attention(normed_1, w_q, w_k, w_v, w_o, rotary)
    normed_2 = rms_norm(middle, norm_2, epsilon)
    from_mlp, *grads_mlp = mlp_backward(grad, normed_2, w_gate, w_up, w_down)
    from_norm_2, grad_norm_2 = rms_norm_backward(from_mlp, middle, norm_2, epsilon)
    grad = grad + from_norm_2
    from_heads, *grads_heads = self_attention_backward(grad, normed_1, w_q, w_k, w_v, w_o, rotary)
    from_norm_1, grad_norm_1 = rms_norm_backward(from_heads, x, norm_1, epsilon)
    return grad + from_norm_1, (grad_norm_1, *grads_heads, grad_norm_2, *grads_mlp)


def layer_weights(weights: Weights, index: int) -> list[np.ndarray]:
    return [weights[f"model.layers.{index}.{name}"] for name in LAYER_NAMES]


def head_name(config) -> str:
    return "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"


def forward(weights: Weights, config, tokens, positions):
    """Each layer's input and the last's output, that output normalised, and the logits."""
    rotary, epsilon = rotary_tables(config, positions), config.rms_norm_eps
    states = [weights["model.embed_tokens.weight"][tokens]]  # each [batch, seq, hidden]
    for index in range(config.num_hidden_layers):
        states.append(block(states[-1], layer_weights(weights, index), epsilon, rotary))
    normed = rms_norm(states[-1], weights["model.norm.weight"], epsilon)
    return states, normed, linear(normed, weights[head_name(config)])


def logits(weights: Weights, config, tokens, positions) -> np.ndarray:
    """tokens [batch, seq], positions [seq] -> [batch, seq, vocab]."""
    return forward(weights, config, tokens, positions)[-1]


def negative_log_likelihood(scores, targets):
    """The sum over targets [batch, seq], and its gradient for scores [batch, seq, vocab]."""
    shifted = scores - scores.max(axis=-1, keepdims=True)  # against overflow, as in attention
    log_p = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    one_hot = targets[..., None] == np.arange(scores.shape[-1])  # [batch, seq, vocab]
    return float(-log_p[one_hot].sum()), np.exp(log_p) - one_hot


def loss_and_gradients(weights: Weights, config, tokens, targets, positions):
    """The summed negative log-likelihood of targets [batch, seq], and every weight's gradient."""
    if not 0 <= targets.min() <= targets.max() < config.vocab_size:
        raise ValueError("every target must be a token id: no label, such as -100, is ignored")
    embedding, norm, head = "model.embed_tokens.weight", "model.norm.weight", head_name(config)
    rotary, epsilon = rotary_tables(config, positions), config.rms_norm_eps
    states, normed, scores = forward(weights, config, tokens, positions)
    loss, grad = negative_log_likelihood(scores, targets)
    gradients = {embedding: np.zeros_like(weights[embedding])}
    grad, gradients[head] = linear_backward(grad, normed, weights[head])
    grad, gradients[norm] = rms_norm_backward(grad, states[-1], weights[norm], epsilon)
    for index in reversed(range(config.num_hidden_layers)):
        layer = layer_weights(weights, index)
        grad, grads_layer = block_backward(grad, states[index], layer, epsilon, rotary)
        for name, grad_weight in zip(LAYER_NAMES, grads_layer, strict=True):
            gradients[f"model.layers.{index}.{name}"] = grad_weight
    # Unlike +=, add.at counts repeated tokens each time. A tied head's share is already there.
    np.add.at(gradients[embedding], tokens, grad)
    return loss, gradients


def gradient_norm(gradients: Weights) -> float:
    """The Euclidean norm of all gradients taken as one vector."""
    return float(np.sqrt(sum(np.sum(g**2) for g in gradients.values())))


def clip(gradients: Weights, max_norm: float) -> Weights:
    """Copies scaled to at most max_norm, by the rule of torch.nn.utils.clip_grad_norm_."""
    factor = min(1.0, max_norm / (gradient_norm(gradients) + 1e-6))
    return {name: factor * g for name, g in gradients.items()}


class AdamW:
    """Adam with decoupled weight decay, arXiv:1711.05101, algorithm 2, updating in place.

    Only matrices decay, not norms. The learning rate scales the decay, as in torch.optim.AdamW.
    """

    def __init__(self, weights: Weights, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0):
        self.weights, self.betas, self.eps, self.weight_decay = weights, betas, eps, weight_decay
        self.steps = 0
        self.means = {name: np.zeros_like(weight) for name, weight in weights.items()}
        self.squares = {name: np.zeros_like(weight) for name, weight in weights.items()}

    def step(self, gradients: Weights, learning_rate: float) -> None:
        self.steps += 1
        beta1, beta2 = self.betas
        for name, weight in self.weights.items():
            grad, mean, square = gradients[name], self.means[name], self.squares[name]
            mean += (1 - beta1) * (grad - mean)
            square += (1 - beta2) * (grad**2 - square)
            if weight.ndim >= 2:
                weight *= 1 - learning_rate * self.weight_decay
            unbiased_mean = mean / (1 - beta1**self.steps)
            unbiased_square = square / (1 - beta2**self.steps)
            weight -= learning_rate * unbiased_mean / (np.sqrt(unbiased_square) + self.eps)
