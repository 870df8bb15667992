"""The classes that MaxText uses in place of its own, by the names that a patched MaxText looks for (`patches/`)."""

from maxtext_mudd.config.mudd_config import MuddConfig
from maxtext_mudd.model.decoder import MuddDecoder
from maxtext_mudd.model.initializers import MuddEmbed
from maxtext_mudd.model.mtp import MuddMultiTokenPredictionBlock

config_class = MuddConfig
decoder_class = MuddDecoder
embedding_class = MuddEmbed
mtp_block_class = MuddMultiTokenPredictionBlock
