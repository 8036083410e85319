"""BERT fine-tuned on the tasks of GLUE."""

from eqvision.recipes.config import LoopConfig, OptimizerConfig, ScheduleConfig
from eqvision.recipes.glue_config import GlueConfig, TextClassifierConfig


def glue_bert_b() -> GlueConfig:
    """BERT base fine-tuned on one task of GLUE, with the hyperparameters of Devlin et al. 2019, section 4.1 and A.3.

    Command: eqvision train glue_bert_b --data.task sst2 --data.path GLUE --model.weights bert-base-uncased
    Data: the task's tables from gluebenchmark.com/tasks below GLUE; the folder of the weights holds model.safetensors,
    config.json and vocab.txt, as google-bert/bert-base-uncased does. Needs the extra [text].
    Published (table 1, test set): CoLA 52.1 (Matthews), SST-2 93.5, MRPC 88.9 and QQP 71.2 (F1), STS-B 85.8
    (Spearman), MNLI 84.6 and 83.4, QNLI 90.5, RTE 66.4 (accuracy). Three epochs of 67,000 sentences in minutes on one
    GPU. Not run here.
    Settings: Adam, batches of 32, 3 epochs, dropout 0.1, decay 0.01. The paper takes the best of 5e-5, 4e-5, 3e-5 and
    2e-5 on the development set for each task, and on small tasks the best of several seeds; this recipe has 3e-5.
    The rate rises over 100 steps (there over a tenth of them) and falls to 0 in a line.
    """
    return GlueConfig(
        model=TextClassifierConfig(name="bert_b_classifier", length=128),
        optimizer=OptimizerConfig(learning_rate=3e-5, weight_decay=0.01, beta2=0.999, eps=1e-6, clip_norm=1.0),
        schedule=ScheduleConfig(kind="linear", warmup_steps=100),
        loop=LoopConfig(epochs=3.0, batch_size=32, eval_batch_size=64, log_every=20),
    )
