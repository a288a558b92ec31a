"""Segmentation networks: DeepLab-LargeFOV on a CNN, Segmenter, and those of segmentation-models-pytorch."""

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from wsss import InputError
from wsss.networks.cnn import CNN
from wsss.networks.decoders import MaskTransformer
from wsss.networks.vit import ViTEncoder, create_timm
from wsss.networks.weights import is_file, load_weights, misfit, read_state_dict

Normalisation = tuple[Any, Any]
"""Mean and standard deviation of the colours that weights were made with."""


class DeepLabLargeFOV(nn.Module):
    """DeepLab-LargeFOV as PSA's followers have it: two dilated 3x3 convolutions with biases on a CNN.

    (B, 3, H, W) normalised -> (B, num_ids, h, w), the stride being the backbone's, 8 of ResNet38.

    Args:
        backbone, weights, backbone_args: see `CNN`.
        num_ids: 1 + C.
        channels: between the two convolutions.
        dilation: of both.
    """

    def __init__(
        self,
        backbone: str,
        weights: str | None,
        backbone_args: Mapping[str, Any],
        num_ids: int,
        channels: int = 512,
        dilation: int = 12,
    ) -> None:
        super().__init__()
        for name, value in (("channels", channels), ("dilation", dilation)):
            if not isinstance(value, int) or value < 1:
                raise InputError(f"decoder_args.{name} is {value!r}: expected a whole number of at least 1")
        self.encoder = CNN(backbone, weights, backbone_args)
        self.normalisation = self.encoder.normalisation
        self.fc8_seg_conv1 = nn.Conv2d(self.encoder.channels, channels, 3, padding=dilation, dilation=dilation)
        self.fc8_seg_conv2 = nn.Conv2d(channels, num_ids, 3, padding=dilation, dilation=dilation)
        for layer in (self.fc8_seg_conv1, self.fc8_seg_conv2):
            nn.init.xavier_uniform_(layer.weight)

    def forward(self, image: Tensor) -> Tensor:
        return self.fc8_seg_conv2(F.relu(self.fc8_seg_conv1(self.encoder(image))))


class Segmenter(nn.Module):
    """A plain vision transformer with Segmenter's decoder, as WeakTr's last stage has it; all of it learns.

    (B, 3, H, W) normalised -> (B, num_ids, h, w), the stride being the patch.

    Args:
        backbone, weights, backbone_args: see `ViTEncoder`.
        num_ids: 1 + C.
        depth: blocks of the decoder.
    """

    def __init__(
        self, backbone: str, weights: str | None, backbone_args: Mapping[str, Any], num_ids: int, depth: int = 2
    ) -> None:
        super().__init__()
        if not isinstance(depth, int) or depth < 1:
            raise InputError(f"decoder_args.depth is {depth!r}: expected a whole number of at least 1")
        self.encoder = ViTEncoder(backbone, weights, backbone_args, aux_layer=-1)
        settings: Any = self.encoder.vit.pretrained_cfg
        self.normalisation: Normalisation | None = (
            None if weights is None else (tuple(settings["mean"]), tuple(settings["std"]))
        )
        first: Any = self.encoder.vit.blocks[0]
        assert self.encoder.vit.pos_embed is not None  # ViTEncoder has seen to it
        self.encoder.vit.pos_embed.requires_grad_(True)
        self.decoder = MaskTransformer(self.encoder.embed_dim, num_ids, first.attn.num_heads, depth)

    def forward(self, image: Tensor) -> Tensor:
        return self.decoder(self.encoder(image).patches)


class EncoderDecoder(nn.Module):
    """Any encoder and decoder of segmentation-models-pytorch.

    (B, 3, H, W) normalised, of any size -> (B, num_ids, H, W).

    Args:
        backbone: name of an encoder: `tu-` and the name of a timm network, or one of the package's own.
        decoder: `unet`, `fpn`, `deeplabv3plus`, ...
        weights: of the encoder: None for random ones, a `.pth` or `.safetensors` file, or, of a `tu-` encoder, a tag in
            timm or the name of an installed package (`efficientnet_lite0`). What segmentation-models-pytorch downloads
            is not used: it does not say which layers found no weights.
        arguments: of the constructors of decoder and encoder, e.g. `decoder_channels`, `encoder_output_stride`.
        num_ids: 1 + C.

    Raises:
        InputError: the package is missing; an unknown name or argument; weights that the encoder does not fit.
    """

    def __init__(
        self, backbone: str, decoder: str, weights: str | None, arguments: Mapping[str, Any], num_ids: int
    ) -> None:
        super().__init__()
        try:
            import segmentation_models_pytorch as smp
        except ImportError as error:
            raise InputError(
                f"decoder {decoder!r} is one of segmentation-models-pytorch, which is not installed: pip install "
                "'wsss[seg]', or set method.decoder=large_fov"
            ) from error
        try:
            self.body = smp.create_model(decoder, backbone, None, classes=num_ids, **arguments)
        except (KeyError, TypeError, ValueError, RuntimeError, AssertionError) as error:
            reason = " ".join(str(error).split())[:400]
            raise InputError(
                f"decoder {decoder!r} on backbone {backbone!r} with {dict(arguments)} is not one of "
                f"segmentation-models-pytorch: {reason}"
            ) from error
        self.encoder = self.body.encoder
        self.loaded: str | None = None
        self.normalisation: Normalisation | None = None
        if weights is not None:
            self.loaded, self.normalisation = load_encoder(self.encoder, backbone, weights)

    def forward(self, image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        stride = self.encoder.output_stride
        padded = F.pad(image, (0, -width % stride, 0, -height % stride))  # by the mean colour
        return self.body(padded)[..., :height, :width]


def load_encoder(encoder: Any, backbone: str, weights: str) -> tuple[str, Normalisation | None]:
    """All weights of an encoder from a file or timm, in words which, and how its images are normalised, if timm says.

    Raises:
        InputError: tensors are missing, unknown, or of another shape; there is no such tag.
    """
    timm_name = backbone.removeprefix("tu-")
    if timm_name == backbone:
        if not is_file(weights):
            raise InputError(
                f"weights {weights!r} of backbone {backbone}: give a file, or take tu-{backbone} and a tag"
            )
        return load_weights(encoder, f"the encoder {backbone}", weights, read_state_dict(weights)), None
    network, loaded = create_timm(timm_name, weights, {})
    # timm calls stages.0 stages_0 where it hands on features, and leaves out what follows the last of them
    theirs = {name.replace(".", "_"): tensor for name, tensor in network.state_dict().items()}
    own = encoder.model.state_dict()
    state = {name: theirs[key] for name in own if (key := name.replace(".", "_")) in theirs}
    if said := misfit(own, state):
        raise InputError(f"weights {weights} of {timm_name} do not fit the encoder {backbone}, which {said}")
    encoder.model.load_state_dict(state)
    settings: Any = network.pretrained_cfg
    return str(loaded), (tuple(settings["mean"]), tuple(settings["std"]))


def build_segmenter(
    backbone: str,
    weights: str | None,
    backbone_args: Mapping[str, Any] | None,
    decoder: str,
    decoder_args: Mapping[str, Any] | None,
    num_ids: int,
) -> DeepLabLargeFOV | Segmenter | EncoderDecoder:
    """The network of a decoder by its name, from plain values.

    It is `large_fov`, `mask_transformer` or one of segmentation-models-pytorch.

    None leaves an argument as it is.

    Raises:
        InputError: as the networks, and for an unknown argument.
    """
    body, head = (
        {name: value for name, value in (given or {}).items() if value is not None}
        for given in (backbone_args, decoder_args)
    )
    known = {"large_fov": ("channels", "dilation"), "mask_transformer": ("depth",)}
    if decoder not in known:
        return EncoderDecoder(backbone, decoder, weights, body | head, num_ids)
    if unknown := head.keys() - known[decoder]:
        raise InputError(f"decoder_args.{min(unknown)}: {decoder} takes {', '.join(known[decoder])}")
    network = DeepLabLargeFOV if decoder == "large_fov" else Segmenter
    return network(backbone, weights, body, num_ids, **head)
