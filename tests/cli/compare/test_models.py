import tokenfusion
from tests.cli.compare.test_comparison import NOTHING_TO_FUSE, random_weights  # noqa: F401
from tests.models.small import small_model
from tokenfusion.cli.compare import models


def test_counterparts():
    loaded = models.load("tokenfusion_crossvit_9_240")
    assert type(loaded.model).__module__ == "timm.models.crossvit"
    assert type(loaded.own).__module__ == "tokenfusion.models.crossvit"
    assert models.load(NOTHING_TO_FUSE).own is None
    plain, own, _ = models._with_own(tokenfusion.create_model("tokenfusion_crossvit_18_dagger_504", img_size=168))
    assert type(plain) is type(own) and "tokenfusion.layers.crossvit" not in {
        type(m).__module__ for m in plain.modules()
    }


def test_a_model_that_only_the_package_has_is_set_beside_itself_unfused():
    model = small_model("token_fusion_late")
    plain, own, eager = models._with_own(model)
    assert own is model and plain is not model
    assert eager == "the same model, its modules not fused"
