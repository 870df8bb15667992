from maxtext_mudd.post_train import run

if __name__ == "__main__":
  run()
