from maxtext_mudd.train import run

if __name__ == "__main__":
  run()
