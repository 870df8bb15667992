"""Vision Transformers with depth connections: MUDDViT, the image classifier of App. F of the MUDDFormer paper.

`python3 -m maxtext_mudd.vit.train` trains one. docs/vit.md tells how, and what is known of the paper's.
"""
