"""Documents -> tokens, in windows for recording and in contexts for training."""

from hf_switch_sae.text.documents import Document, Documents, read_documents

__all__ = ["Document", "Documents", "read_documents"]
