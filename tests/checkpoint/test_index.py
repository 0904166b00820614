"""Model directories: which files count, what the index may say, and what is refused."""

import json
import os
import pickle
import subprocess
import sys

import pytest
import torch

from streammerge.checkpoint import open_model
from streammerge.io.reader import Reader
from streammerge.tensors.read import read_elements
from tests.checkpoint.sharded import F32, MAP, SHARDS, A, B, refusal
from tests.formats.safetensors_files import framed, sound, within, write_model


@pytest.fixture(autouse=True)
def no_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "no cache"))


# Which files.


def test_a_sharded_model_is_one_map_in_file_order(tmp_path):
    index = open_model(write_model(tmp_path / "m", SHARDS, MAP))
    assert list(index) == ["w.1", "w.0", "w.2"]
    assert (len(index), index.nbytes, index.unlisted) == (3, 24, ())
    assert (index.reference, index.directory) == (str(tmp_path / "m"), tmp_path / "m")
    assert [stamp.path for stamp in index.stamps] == [str(tmp_path / "m" / f) for f in (A, B)]
    assert index["w.2"].path == str(tmp_path / "m" / B)
    assert "w.9" not in index
    with pytest.raises(KeyError):
        index["w.9"]


def test_a_single_file_model_is_found_in_its_directory_and_by_its_path(tmp_path):
    write_model(tmp_path, {"model.safetensors": {"w": F32}})
    for reference in (tmp_path, tmp_path / "model.safetensors"):
        index = open_model(reference)
        assert list(index) == ["w"]
        assert index.directory == tmp_path
        assert index.reference == str(reference)


def test_any_name_will_do_for_a_file_that_is_given_by_path(tmp_path):
    write_model(tmp_path, {"a.safetensors": {"w": F32}, "b.safetensors": {"w": F32}})
    assert list(open_model(tmp_path / "b.safetensors")) == ["w"]


def test_shards_without_an_index_are_one_model_but_may_not_share_a_name(tmp_path):
    write_model(tmp_path, SHARDS)
    assert list(open_model(tmp_path)) == ["w.1", "w.0", "w.2"]
    (tmp_path / B).write_bytes(sound({"w.0": F32}))
    assert f"{B}: tensor 'w.0' is in '{A}' too" in refusal(tmp_path)


def test_shards_without_an_index_must_be_all_there(tmp_path):
    # Nothing else would tell: the names of the lost tensors are lost too.
    write_model(tmp_path, {A: SHARDS[A]})
    assert "1 of 2 shards 'model' and no index" in refusal(tmp_path)


def test_the_index_wins_over_a_single_file_and_over_other_files(tmp_path):
    # As in repositories that hold the original `consolidated.safetensors` too.
    others = {"model.safetensors": {"x": F32}, "consolidated.safetensors": {"w.0": F32}}
    write_model(tmp_path, {**SHARDS, **others}, MAP)
    assert set(open_model(tmp_path)) == set(MAP)


def test_the_single_file_wins_over_shards_without_an_index(tmp_path):
    write_model(tmp_path, {**SHARDS, "model.safetensors": {"x": F32}})
    assert set(open_model(tmp_path)) == {"x"}


def test_hidden_files_are_no_shards(tmp_path):
    write_model(tmp_path, {"model.fp16.safetensors": {"x": F32}})
    (tmp_path / "._model.fp16.safetensors").write_bytes(b"left by another system")
    assert set(open_model(tmp_path)) == {"x"}


def test_what_the_index_leaves_out_is_kept_out_and_listed(tmp_path):
    write_model(tmp_path, SHARDS, {"w.0": A, "w.2": B})
    index = open_model(tmp_path)
    assert set(index) == {"w.0", "w.2"}
    assert index.unlisted == ("w.1",)


def test_of_a_name_in_two_shards_the_index_picks_one(tmp_path):
    write_model(tmp_path, {A: {"w": F32}, B: {"w": F32, "v": F32}}, {"w": B, "v": B})
    assert open_model(tmp_path)["w"].path.endswith(B)
    write_model(tmp_path, {}, {"w": A, "v": B})
    index = open_model(tmp_path)
    assert index["w"].path.endswith(A)
    assert index.unlisted == ()


@pytest.mark.parametrize("total", [-1, 0, 1e30, 12.5, "many", None, {}, [1]])
def test_a_wrong_total_size_does_not_matter(tmp_path, total):
    # Nobody reads it, and transformers itself has written fractions.
    write_model(tmp_path, SHARDS, MAP, metadata={"total_size": total})
    assert set(open_model(tmp_path)) == set(MAP)


def test_an_index_without_metadata_is_sound(tmp_path):
    write_model(tmp_path, SHARDS)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": MAP}))
    assert set(open_model(tmp_path)) == set(MAP)


def test_shards_may_be_links_to_blobs(tmp_path):
    model = tmp_path / "m"
    write_model(model, SHARDS, MAP)
    (tmp_path / "blobs").mkdir()
    for file in os.listdir(model):
        os.rename(model / file, tmp_path / "blobs" / file)
        (model / file).symlink_to(f"../blobs/{file}")
    assert set(open_model(model)) == set(MAP)


@pytest.mark.parametrize(
    "name", ["it's", 'say "a"', "$(touch x)", "%s{0}", "-rf", "模型", "two words", "a@b", "~"]
)
def test_odd_directory_names_are_just_names(tmp_path, name, monkeypatch):
    write_model(tmp_path / name, {"model.safetensors": {"w": F32}})
    assert set(open_model(tmp_path / name)) == {"w"}
    monkeypatch.chdir(tmp_path)
    assert set(open_model(name)) == {"w"}
    assert os.listdir(tmp_path) == [name]


def test_a_home_directory_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_model(tmp_path / "m", {"model.safetensors": {"w": F32}})
    assert open_model("~/m").directory == tmp_path / "m"


def saved(directory, **shards):
    """Write files of torch.save, and return what they hold together."""
    directory.mkdir(exist_ok=True)
    for name, tensors in shards.items():
        torch.save(tensors, directory / f"{name.replace('_of_', '-of-').replace('model_0', 'model-0')}.bin")
    return {name: tensor for tensors in shards.values() for name, tensor in tensors.items()}


def assert_holds(index, tensors):
    assert set(index) == set(tensors)
    for name, tensor in tensors.items():
        own = tensor.contiguous().view(torch.uint8).flatten().numpy()
        assert (read_elements(Reader(), index[name], 0, tensor.numel()) == own).all()
        assert index[name].shape == tuple(tensor.shape)


def test_a_checkpoint_of_torch_save_is_a_model(tmp_path):
    tensors = saved(tmp_path / "m", pytorch_model={"w": torch.randn(2, 3), "b": torch.randn(3).bfloat16()})
    (tmp_path / "m" / "training_args.bin").write_bytes(b"not a model at all")
    assert_holds(open_model(tmp_path / "m"), tensors)
    assert_holds(open_model(tmp_path / "m" / "pytorch_model.bin"), tensors)


@pytest.mark.parametrize("with_index", [True, False])
def test_a_checkpoint_of_torch_save_may_have_shards(tmp_path, with_index):
    parts = {
        "pytorch_model_00001_of_00002": {"w": torch.randn(2, 3)},
        "pytorch_model_00002_of_00002": {"v": torch.ones(4)},
    }
    tensors = saved(tmp_path / "m", **parts)
    files = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    if with_index:
        index = {"weight_map": dict(zip("wv", files, strict=True))}
        (tmp_path / "m" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert_holds(open_model(tmp_path / "m"), tensors)
    (tmp_path / "m" / files[1]).unlink()
    assert "missing" in refusal(tmp_path / "m") if with_index else "1 of 2 shards" in refusal(tmp_path / "m")


def test_an_index_of_pickles_leads_to_no_other_files(tmp_path):
    saved(tmp_path / "m", pytorch_model_00001_of_00001={"w": torch.ones(2)})
    for shard, words in (
        ("../x.bin", "not a plain file name"),
        ("config.json", "not a .bin file"),
        ("y.bin", "missing"),
    ):
        (tmp_path / "m" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"w": shard}}))
        line = refusal(tmp_path / "m")
        assert "pytorch_model.bin.index.json" in line
        assert words in line


def test_other_files_of_torch_save_are_no_model(tmp_path):
    saved(tmp_path / "m", optimizer={"w": torch.ones(2)}, training_args={"v": torch.ones(2)})
    assert "no model here" in refusal(tmp_path / "m")


@pytest.mark.parametrize(
    "name", ["global_step10", "zero_to_fp32.py", "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"]
)
def test_shards_of_deepspeed_are_called_so(name, tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / name).touch()
    assert "DeepSpeed's shards of a training: put them together with its `zero_to_fp32.py`" in refusal(
        tmp_path / "m"
    )


def test_a_program_in_a_checkpoint_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    for name in ("pytorch_model.bin", "model.pt"):
        directory = tmp_path / name.replace(".", "_")
        directory.mkdir()
        (directory / name).write_bytes(pickle.dumps(Evil()))
        assert "no zip archive" in refusal(directory / name)
        torch.save({"w": Evil()}, directory / name)
        assert "mkdir" in refusal(directory / name)
    assert not (tmp_path / "executed").exists()


def test_pickles_beside_safetensors_are_never_opened(tmp_path):
    write_model(tmp_path, {"model.safetensors": {"w": F32}})
    os.mkfifo(tmp_path / "pytorch_model.bin")  # Opening it would hang.
    with within(2):
        assert set(open_model(tmp_path)) == {"w"}


def test_an_adapter_alone_is_refused_but_its_config_beside_a_model_is_not_in_the_way(tmp_path):
    write_model(tmp_path, {"adapter_model.safetensors": {"lora_A": F32}})
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "a LoRA adapter, not a model: write `base+adapter`" in refusal(tmp_path)
    write_model(tmp_path, {"model.safetensors": {"w": F32}})
    assert set(open_model(tmp_path)) == {"w"}
    assert "base: no such directory" in refusal("base+adapter")


# Weight.


def test_headers_need_neither_numpy_nor_torch_nor_safetensors():
    code = (
        "import sys, streammerge.checkpoint\n"
        "print(sorted({'numpy', 'torch', 'safetensors', 'numba'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_an_index_travels_to_another_process(tmp_path):
    index = open_model(write_model(tmp_path, SHARDS, MAP))
    assert pickle.loads(pickle.dumps(index)) == index


def test_the_headers_of_four_models_of_405b_are_read_in_seconds(tmp_path):
    models = []
    for m in range(4):
        shards, size = {}, 2 * 16384 * 16384
        for s in range(191):
            names = [f"model.layers.{s}.self_attn.{i}_proj.weight" for i in range(6)]
            header = {
                name: {"dtype": "BF16", "shape": [16384, 16384], "data_offsets": [i * size, i * size + size]}
                for i, name in enumerate(names)
            }
            file = f"model-{s + 1:05d}-of-00191.safetensors"
            shards |= dict.fromkeys(names, file)
            path = tmp_path / str(m) / file
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(framed(header, b""))
            os.truncate(path, path.stat().st_size + 6 * size)  # Sparse.
        models.append(write_model(tmp_path / str(m), {}, shards))
    with within(5):  # It takes 0.1 s on an idle core; the test machine may be busy.
        indexes = [open_model(model) for model in models]
    assert [len(index) for index in indexes] == [1146] * 4
    assert indexes[0].nbytes == 1146 * size
