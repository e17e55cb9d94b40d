"""The presets and the hardware they are shipped for, as arguments of `plan` and of `train`."""

_ALIGN = "--config.init_from=BASE --config.data.train=chat:DATA.jsonl"
_PPO = f"{_ALIGN} --config.ppo.reward_from=RM"

# By a short name. The number of microbatches and the policy of rematerialisation depend on the
# hardware; everything else is the preset's.
SHIPPED = {
    "1_8b v5e:2x2": "configs/1_8b.py --topology=v5e:2x2 --config.train.num_microbatches=256 "
    "--config.model.remat=full",
    "1_8b v5p:2x2x2": "configs/1_8b.py --topology=v5p:2x2x2 --config.train.num_microbatches=64",
    "1_8b h100:1": "configs/1_8b.py --topology=h100:1 --config.train.num_microbatches=256",
    "7b v5p:2x4x4": "configs/7b.py --topology=v5p:2x4x4",
    "7b v6e:4x4": "configs/7b.py --topology=v6e:4x4 --config.train.num_microbatches=64 "
    "--config.model.remat=full",
    "7b v5e:4x4": "configs/7b.py --topology=v5e:4x4 --config.train.num_microbatches=128 "
    "--config.model.remat=full",
    "7b h100:8": "configs/7b.py --topology=h100:8 --config.train.num_microbatches=128",
    # No room for a second set of gradients: a batch is one microbatch of 8 rows.
    "7b h200:1": "configs/7b.py --topology=h200:1 --config.train.num_microbatches=1 "
    "--config.data.batch_size=8 --config.data.virtual_shards=8 --config.model.remat=full",
    # Sums over a part of a torus: over all of it, TPUs gather and scatter by all-reduce, at twice
    # the bytes.
    "7b 2 x v5e:16x16": "configs/7b.py --topology=v5e:16x16 --slices=2 --config.mesh.dcn=2 "
    "--config.mesh.data=16 --config.train.num_microbatches=4 --config.model.remat=full",
    "14b v5p:4x4x4": "configs/14b.py --topology=v5p:4x4x4 --config.mesh.tensor=2 "
    "--config.train.num_microbatches=16",
    # Shards within a node: only gradients go over the network.
    "14b h100:4x8": "configs/14b.py --topology=h100:4x8 --config.mesh.data=4 "
    "--config.train.num_microbatches=16 --config.model.remat=full",
    "72b v5p:8x8x8": "configs/72b.py --topology=v5p:8x8x8 --config.mesh.tensor=2 "
    "--config.model.remat=save_matmuls",
    "sft 7b v5p:2x4x4": f"configs/sft.py:7b --topology=v5p:2x4x4 {_ALIGN}",
    "sft 7b lora h100:1": f"configs/sft.py:7b,lora --topology=h100:1 {_ALIGN}",
    "reward 7b h100:8": f"configs/reward.py:7b --topology=h100:8 {_ALIGN}",
    "ppo 7b v5p:2x4x4": f"configs/ppo.py:7b --topology=v5p:2x4x4 {_PPO} "
    "--config.train.num_microbatches=1",
}


def arguments(name: str) -> list[str]:
    """The command line of a pair, to be given to `plan.__main__`."""
    return ["plan", *f"--config={SHIPPED[name]}".split()]
