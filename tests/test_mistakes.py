"""Wrong and odd inputs on the command line: each ends in one sentence that names the key or file, before training.

`TABLE` holds them, a line for each: the overrides as a shell would read them, and what the sentence must hold.
"""

import re
import shlex
from pathlib import Path

import pytest
from hydra._internal.hydra import Hydra

from conftest import MICRO
from ultrarefiner.runs import experiment

TABLE = r"""
seed=-1                                             → seed must be 0 or more and less than 4294967296, got -1
seed=4294967296                                     → seed must be .* got 4294967296
seed=1.5                                            → seed=1\.5
seed=null                                           → seed=null
seed=text                                           → seed=text
fold=-1                                             → fold must be 0 or more, got -1
fold=5                                              → fold=5 .* 0…4
fold=1.5                                            → fold=1\.5
fold=null                                           → fold=null
fold=0,1                                            → fold=0,1.*--multirun
upstream=perhaps                                    → upstream must be one of build, require
upstream=null                                       → upstream=null
allow_seen=maybe                                    → allow_seen=maybe
output_root=null                                    → output_root=null
output_root=/dev/null                               → /dev/null/cache.*another output_root
output_root=/proc/nowhere                           → /proc/nowhere/cache.*another output_root
+foo=1                                              → foo
foo=1                                               → foo.*--cfg job
phase=sam phase.early_epochs=2                      → phase\.early_epochs needs phase\.real_ratio above 0
phase=sam model/sam=medsam                          → give model\.sam\.checkpoint=auto.*or model\.sam\.checkpoint=<
phase.epohcs=3                                      → phase\.epohcs.*phase\.epochs
~fold                                               → fold is needed
~dataset.reader                                     → ~dataset\.reader.*deletion
+model.foo=1                                        → no key model\.foo
+trainer.foo=1                                      → no key trainer\.foo
phase                                               → 'phase' missing EQUAL
phase.epochs                                        → 'phase\.epochs' missing EQUAL
phase=                                              → phase=.*coarse, e2e, sam
=3                                                  → =3
phase.epochs=                                       → phase\.epochs=
phase.epochs=3=4                                    → phase\.epochs='3=4'
phase.epochs=~3                                     → phase\.epochs='~3'
'phase.epochs = 3'                                  → phase\.epochs
+experiments=nothing                                → experiments=nothing
experiments=nothing                                 → experiments
--config-dir /nowhere                               → /nowhere
--config-name nothing                               → nothing
roi=maybe                                           → roi=maybe.*off, on
roi=null                                            → roi=null.*a group takes
roi=true                                            → roi=true.*a group takes
model=null                                          → model=null.*a group takes
model=huge                                          → model=huge.*base, lite, tiny
model/coarse=null                                   → model/coarse=null.*a group takes
model/coarse=nothing                                → model/coarse=nothing
model/sam=nothing                                   → model/sam=nothing
gate=nothing                                        → gate=nothing
prompt_style=nothing                                → prompt_style=nothing
protection=nothing                                  → protection=nothing
dataset=nothing                                     → dataset=nothing
dataset=null                                        → dataset=null.*a group takes
trainer=nothing                                     → trainer=nothing
trainer=null                                        → trainer=null.*a group takes
logger=nothing                                      → logger=nothing
logger=null                                         → logger=null.*a group takes
hydra/launcher=nothing                              → launcher=nothing
logger=tensorboard +logger.tensorboard.foo=1        → logger\.tensorboard.*'foo'
+logger.tensorboard.foo=1                           → logger\.tensorboard is no logger.*_target_
+logger.x=1                                         → logger\.x is no logger
+logger.x={}                                        → logger\.x is no logger
+logger.x._target_=foo.Bar                          → logger\.x\._target_=foo\.Bar
+logger.x._target_=os.getcwd                        → logger\.x: os\.getcwd
logger=wandb logger.wandb.projekt=a                 → logger\.wandb\.projekt
logger=wandb +logger.wandb.projekt=a                → logger\.wandb.*'projekt'
trainer.devices=0                                   → trainer\.devices must be 1 or more, got 0
trainer.devices=-1                                  → trainer\.devices must be 1 or more
trainer.devices=two                                 → trainer\.devices=two
trainer.devices=auto                                → trainer\.devices=auto
trainer.num_nodes=0                                 → trainer\.num_nodes must be 1 or more
trainer.num_nodes=2                                 → trainer\.num_nodes=2
trainer.accelerator=foo                             → trainer=.accelerator: foo
trainer.accelerator=tpu                             → trainer=.accelerator: tpu
trainer.accelerator=null                            → trainer\.accelerator=null
trainer.precision=foo                               → trainer\.precision must be one of auto, 32-true
trainer.precision=16                                → trainer\.precision must be one of
trainer.precision=16-true                           → trainer\.precision must be one of .*64-true
--foo                                               → --foo; --help
--cfg foo                                           → --cfg.*'foo'
--cfg                                               → --cfg.*expected one argument
--multirun --cfg job fold=0,1                       → Only one of .*--multirun, --cfg
-sc                                                 → one subcommand from .*install
fold=0 --multirun foo=1                             → foo.*--cfg job
trainer.precision=null                              → trainer\.precision=null
trainer.strategy=foo                                → trainer=.*strategy: foo
trainer.strategy=null                               → trainer\.strategy=null
trainer.num_workers=-1                              → trainer\.num_workers must be between 0 and 512
trainer.num_workers=100000                          → trainer\.num_workers must be between 0 and 512
trainer.accumulate=0                                → trainer\.accumulate must be 1 or more
trainer.budget_minutes=nan                          → trainer\.budget_minutes must be more than 0
trainer.budget_minutes=0                            → trainer\.budget_minutes must be more than 0
trainer.budget_minutes=-1                           → trainer\.budget_minutes must be more than 0
trainer.save_minutes=-1                             → trainer\.save_minutes must be 0 or more
trainer.save_minutes=inf                            → trainer\.save_minutes must be 0 or more
trainer.embeddings_gb=-1                            → trainer\.embeddings_gb must be 0 or more
trainer.deterministic=maybe                         → trainer\.deterministic=maybe
dataset.test_fraction=0                             → dataset\.test_fraction must be more than 0 and less than 1
dataset.test_fraction=1                             → dataset\.test_fraction must be more than 0 and less than 1
dataset.test_fraction=nan                           → dataset\.test_fraction must be .* got nan
dataset.folds=1                                     → dataset\.folds must be 2 or more
dataset.folds=1000                                  → 1000 folds
dataset.split_seed=-1                               → dataset\.split_seed must be 0 or more
dataset.split_seed=99999999999999999999             → dataset\.split_seed must be
dataset.limit.train=0                               → dataset\.limit\.train must be 1 or more
dataset.limit.foo=1                                 → dataset\.limit\.foo
dataset.limit=5                                     → dataset\.limit=5: this holds settings of its own
dataset.without=[0,1,2]                             → dataset\.without=\[0, 1, 2\]
dataset.without=[5,2]                               → dataset\.without=\[5,2\]
dataset.without=[-1,2]                              → dataset\.without=\[-1,2\]
dataset.without=[0,0]                               → dataset\.without=\[0,0\]
dataset.without=[0]                                 → dataset\.without=\[0\]
dataset.without=3                                   → dataset\.without=3: .*give dataset\.without=\[3\]
dataset.name=../../x                                → dataset\.name must be a name.*'\.\./\.\./x'
dataset.name=/abs                                   → dataset\.name must be a name
dataset.name=''                                     → dataset\.name must not be empty
dataset.name=null                                   → dataset\.name=null
model.name=../x                                     → model\.name must be a name
model.name=a/b                                      → model\.name must be a name
'model.name=a\b'                                    → model\.name must be a name
'model.name="[/red]"'                               → model\.name must be a name
model.name=aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa → model\.name must be a
model.name=.hidden                                  → model\.name must be a name
phase.name=../x                                     → phase\.name must be a name
phase.coarse.name=a/b                               → phase\.coarse\.name must be a name
roi.name=a/b                                        → roi\.name must be on
dataset.reader.cases=0                              → dataset\.reader\.cases=0
dataset.reader.cases=-1                             → dataset\.reader\.cases=-1
dataset.reader.cases=3                              → phantom has 2 patients
dataset.reader.cases=text                           → dataset\.reader
dataset.reader.size=0                               → dataset\.reader\.size=0
dataset.reader.seed=-1                              → dataset\.reader\.seed=-1
dataset.reader.foo=1                                → dataset\.reader\.foo
+dataset.reader.foo=1                               → dataset\.reader.*'foo'
dataset.reader._target_=foo.Bar                     → dataset\.reader\._target_=foo\.Bar.*No module named 'foo'
dataset.reader._target_=os.getcwd                   → dataset\.reader: os\.getcwd
~dataset.reader._target_                            → dataset\.reader needs .* dataset\.reader\._target_
dataset.reader=null                                 → dataset\.reader=null
+dataset.augment.foo=1                              → dataset\.augment.*'foo'
dataset.augment._target_=foo.Bar                    → dataset\.augment\._target_=foo\.Bar
+dataset.augment.rotation=text                      → dataset\.augment
dataset.include_normal=maybe                        → dataset\.include_normal=maybe
phase._target_=foo.Bar                              → phase\._target_=foo\.Bar.*No module named 'foo'
phase._target_=os.path.join                         → phase\._target_=os\.path\.join is no phase
phase._target_=ultrarefiner                         → phase\._target_=ultrarefiner
phase._target_=null                                 → phase\._target_=null
phase.coarse._target_=foo.Bar                       → phase\._target_=foo\.Bar
phase.sam._target_=foo.Bar                          → phase\._target_=foo\.Bar
phase.coarse_checkpoint=pretrained                  → phase\.coarse_checkpoint=pretrained.*no published file
phase.coarse_checkpoint=auto                        → phase\.coarse_checkpoint=auto
phase.sam_checkpoint=auto                           → phase\.sam_checkpoint=auto
phase.coarse_checkpoint=/tmp                        → phase\.coarse_checkpoint=/tmp cannot be read
phase.coarse_checkpoint=/nowhere                    → phase\.coarse_checkpoint=/nowhere cannot be read
phase.sam_checkpoint=''                             → phase\.sam_checkpoint must not be empty
phase.sam_checkpoint=FILE                           → mistake\.txt
phase.coarse_checkpoint=FILE                        → mistake\.txt
phase.coarse_lr=nan                                 → phase\.coarse_lr must be 0 or more, got nan
phase.sam_lr=-1                                     → phase\.sam_lr must be 0 or more, got -1
phase.sam.lr=nan                                    → phase\.sam\.lr must be 0 or more
phase.coarse.lr=-1                                  → phase\.coarse\.lr must be 0 or more
phase.coarse.epochs=0                               → phase\.coarse\.epochs must be between 1 and 1000000
phase.optimizer.weight_decay=-1                     → phase\.optimizer.*weight_decay
phase.ema_decay=1                                   → phase\.ema_decay must be more than 0 and less than 1
phase.ema_decay=0.9 protection.guard=0.1            → protection\.guard.*phase\.ema_decay
phase.bce_weight=0 phase.dice_weight=0 phase.ce_weight=0 phase.coarse_dice_weight=0 → one of phase
phase=coarse phase.ce_weight=0 phase.dice_weight=0  → one of phase\.ce_weight, phase\.dice_weight must be more than 0
phase=coarse phase.ce_weight=-1                     → phase\.ce_weight must be 0 or more
phase=coarse phase.lr=nan                           → phase\.lr must be 0 or more, got nan
phase=coarse phase.lr=-1                            → phase\.lr must be 0 or more
phase=coarse phase.lr=inf                           → phase\.lr must be 0 or more
phase=coarse phase.poly_power=-1                    → phase\.poly_power must be 0 or more
phase=coarse phase.grad_clip=0                      → phase\.grad_clip must be more than 0
phase=coarse phase.patience=0                       → phase\.patience must be 1 or more
phase=coarse phase.epochs=0                         → phase\.epochs must be between 1 and 1000000
phase=coarse phase.epochs=1.5                       → phase\.epochs=1\.5
phase=coarse phase.batch_size=0                     → phase\.batch_size must be 1 or more
phase=coarse phase.batch_size=null                  → phase\.batch_size=null
phase=coarse phase.optimizer=null                   → phase\.optimizer=null
phase=coarse phase.optimizer._target_=foo.Bar       → phase\.optimizer\._target_=foo\.Bar
phase=coarse phase.optimizer._target_=torch.optim.LBFGS → phase\.optimizer.*LBFGS
phase=coarse phase.optimizer.momentum=-1            → phase\.optimizer.*momentum
phase=coarse phase.optimizer.momentum=nan           → phase\.optimizer\.momentum must be 0 or more
phase=coarse +phase.optimizer.foo=1                 → phase\.optimizer.*'foo'
phase=sam phase.bce_weight=0 phase.dice_weight=0 phase.focal_weight=0 phase.change_weight=0 phase.iou_weight=0 → more
phase=sam phase.good_from=1                         → phase\.good_from must be 0 or more and less than 1
phase=sam phase.masks_per_image=0                   → phase\.masks_per_image must be 1 or more
phase=sam phase.masks=/nowhere                      → phase\.masks=/nowhere
phase=sam phase.masks=FILE                          → phase\.masks=.*mistake\.txt
phase=sam phase.softness=foo                        → phase\.softness must be one of null, fit
phase=sam phase.bins=foo                            → phase\.bins must be one of null, fit
phase=sam phase.real_ratio=2                        → phase\.real_ratio must be between 0 and 1
phase=sam phase.real_ratio=nan                      → phase\.real_ratio must be between 0 and 1
phase=sam phase.parts=1                             → phase\.parts must be 2 or more
phase=sam phase.softness=fit phase.coarse.lr=nan    → phase\.coarse\.lr must be 0 or more
phase=sam phase.failures._target_=foo.Bar           → phase\.failures\._target_=foo\.Bar
phase=sam +phase.failures.foo=1                     → phase\.failures.*'foo'
phase=sam +phase.failures.bins=[]                   → bins
phase=sam +phase.failures.bins=[[0.9,0.1,1]]        → bins has the row
phase=sam +phase.failures.bins=text                 → phase\.failures
phase=sam +phase.failures.softness=3                → phase\.failures
phase=sam model/coarse=files                        → model/coarse=files needs phase\.masks
model/coarse=files                                  → phase=e2e trains a coarse network
phase=coarse model/coarse=files                     → phase=coarse trains a coarse network
protection.coarse_loss_weight=0 protection.refined_loss_weight=0 → one of protection\.coarse_loss_weight, protection
protection.grad_scale=nan                           → protection\.grad_scale must be 0 or more
protection.grad_scale=-1                            → protection\.grad_scale must be 0 or more
protection.guard=nan                                → protection\.guard must be 0 or more
protection.freeze_epochs=-1                         → protection\.freeze_epochs must be 0 or more
protection.freeze_epochs=1 protection.sam_freeze_epochs=1 → protection\.freeze_epochs.*sam_freeze_epochs
protection.weight_reg=nan                           → protection\.weight_reg must be 0 or more
protection.warn_drop=nan                            → protection\.warn_drop must be 0 or more
roi=off roi.k=1                                     → roi\.k
roi.k=0                                             → roi\.k must be more than 0
roi.k=nan                                           → roi\.k must be more than 0
roi.min_size=2                                      → roi\.min_size must be more than 0 and at most 1
roi.expand_ration=1                                 → roi\.expand_ration.*roi\.expand_ratio
roi._target_=foo.Bar                                → roi\._target_=foo\.Bar
roi._target_=torch.nn.Conv2d                        → roi: torch\.nn\.Conv2d
roi._target_=torch.nn.Identity                      → a first case fails: AttributeError.*torch\.nn.*Identity
+roi.foo=1                                          → no key roi\.foo
gate=learned gate.width=0                           → gate.*width must be between 1 and 1024
gate=learned gate.width=-1                          → gate.*width must be between 1 and 1024
gate=learned gate.width=2.5                         → gate
gate=learned gate.low=0.9 gate.high=0.1             → gate.*low=0\.9
gate=uncertainty gate.gamma=-1                      → gate.*gamma=-1
gate=uncertainty gate.gamma=nan                     → gate\.gamma must be finite
gate=uncertainty gate.gamma=text                    → gate: .*UncertaintyGate fails: Type(Check)?Error
gate._target_=foo.Bar                               → gate\._target_=foo\.Bar
prompt_style.box_k=0                                → prompt_style\.box_k must be more than 0
prompt_style.temperature=2                          → prompt_style\.temperature must be more than 0 and at most 1
prompt_style=gaussian prompt_style.mask.sigma=0     → prompt_style.*sigma must lie in \(0, 1\], got 0
prompt_style=distance prompt_style.mask.sigma=-1    → prompt_style.*sigma must lie in
prompt_style=gaussian prompt_style.mask.sigma=nan   → prompt_style\.mask\.sigma must be finite
prompt_style.mask._target_=foo.Bar                  → prompt_style.*foo\.Bar
prompt_style.mask._target_=torch.nn.Identity        → a first case fails: .*torch\.nn.*Identity
'model.prompts={mask: false, point: false, negative_point: false, box: false}' → prompt_style
model.image_size=0                                  → model\.image_size must be between 16 and 8192
model.image_size=100000                             → model\.image_size must be between 16 and 8192
model.image_size=text                               → model\.image_size=text
model.coarse_size=0                                 → model\.coarse_size must be between 16 and 8192
model.coarse_size=63                                → image_size=63 is not a multiple
model.coarse=3                                      → model\.coarse=3
model.coarse._target_=foo.Bar                       → model\.coarse\._target_=foo\.Bar
model.coarse._target_=torch.nn.Identity             → model\.coarse: torch\.nn.*Identity gives \(1, 1, 64, 64\)
model.coarse.name=nothing                           → no TransUNet named 'nothing'
+model.coarse.num_classes=3                         → model\.coarse.*\(1, 3, 64, 64\).*not \(1, 2, 64, 64\)
+model.coarse.n_skip=9                              → n_skip=9
+model.coarse.foo=1                                 → model\.coarse.*'foo'
model.coarse_weights=/nowhere                       → model\.coarse_weights=/nowhere cannot be read
model.coarse_weights=/tmp                           → model\.coarse_weights=/tmp cannot be read
model.coarse_weights=auto                           → model\.coarse_weights=auto
model.coarse_weights=pretrained                     → pretrained does not exist
model.coarse_weights=FILE                           → mistake\.txt
model.sam=null                                      → model\.sam=null
model.sam.family=nothing                            → SAM family 'nothing'
model.sam.checkpoint=/nowhere                       → model\.sam\.checkpoint=/nowhere cannot be read
model.sam.checkpoint=FILE                           → mistake\.txt
model.sam._target_=foo.Bar                          → model\.sam\._target_=foo\.Bar
+model.sam.foo=1                                    → model\.sam.*'foo'
model/sam=vit_b                                     → vit_b.*checkpoint=auto
model.lora.rank=-1                                  → model\.lora\.rank must be 0 or more
model.lora.rank=1 model.lora.alpha=0                → model\.lora\.alpha must be more than 0
model.lora.rank=1 model.lora.targets=[]             → lora targets
model.lora.rank=1 model.lora.targets=3              → model\.lora\.targets=3
model.lora.rank=1 model.lora.blocks=0               → lora blocks=0
model.lora.rank=1 model.lora.blocks=-1              → lora blocks=-1
model.gradient=half                                 → model\.gradient must be one of exact, frozen
model.frame=crop                                    → model\.frame must be one of pad, stretch
model.selection_temperature=0                       → model\.selection_temperature must be more than 0
phase.crops=2                                       → phase\.crops=2 is of no use here.*roi=off
phase.crops=0                                       → phase\.crops must be 1 or more, got 0
model.schedule.coarse.lr=nan                        → model\.schedule\.coarse\.lr must be finite
model.schedule.coarse.optimizer=foo.Bar phase=coarse → phase\.optimizer\._target_=foo\.Bar
model.schedule.sam.epochs=-1                        → phase\.sam\.epochs must be between 1 and 1000000
model.prompts.temperature=7                         → prompt_style\.temperature must be
model.roi.expand_ratio=-1                           → model\.roi\.expand_ratio must be 0 or more
model.train.image_encoder=maybe                     → model\.train\.image_encoder=maybe
dataset=busi                                        → dataset=busi needs data_root
dataset=busi data_root=''                           → data_root must not be empty, got ''
dataset=busi data_root=/nowhere                     → data_root=/nowhere does not exist
dataset=busi data_root=FILE                         → data_root=.*mistake\.txt is a file
dataset=busi data_root=~nosuchuser/X                    → data_root=~nosuchuser/X: this machine has no such user
"dataset=busi" "data_root=/no/a (1)/b=c"            → data_root=/no/a \(1\)/b=c does not exist
"dataset=busi" "data_root=/no/it's"                 → data_root=/no/it's does not exist
'dataset=busi' 'data_root=/no/a#b'                  → data_root=/no/a#b does not exist
'dataset=busi' 'data_root={a'                       → data_root={a does not exist
'dataset=busi' 'data_root=C:\no\'                   → data_root=C:\\no\\ does not exist
dataset=busi data_root='${oc.env:NOPE}'             → 'NOPE' not found
dataset=busi data_root='${nothing'                  → nothing
dataset=busi data_root=x,y                          → data_root=x,y
dataset=combined data_root=/tmp                     → dataset\.members
dataset=combined dataset.members=[nothing] data_root=/tmp → nothing
dataset=combined dataset.members=busi data_root=/tmp → dataset\.members=busi
dataset=folder data_root=/tmp dataset.reader.table=no.csv → data_root|/tmp
phase=coarse phase.name=e2e                         → phase\.name=e2e is not what .*CoarsePhase is called
phase.name=e2e phase=coarse                         → phase\.name=e2e is not what .*CoarsePhase is called
phase=coarse phase.name=own                         → phase\.name=own is not what
phase=e2e phase.name=sam                            → phase\.name=sam is not what
phase.coarse.name=sam                               → phase\.name=sam is not what
roi=on roi.name=off                                 → roi\.name must be on, got off
roi=off roi.name=on                                 → roi\.name must be off, got on
protection.freeze_epochs=2                          → protection\.freeze_epochs=2 is all of phase\.epochs=2.*coarse_lr=0
protection.freeze_epochs=100                        → protection\.freeze_epochs=100 is all of phase\.epochs=2
protection.sam_freeze_epochs=2                      → protection\.sam_freeze_epochs=2 is all of.*sam_lr=0
phase=coarse phase.optimizer.momentum=2             → phase\.optimizer\.momentum must be .* got 2
phase=coarse phase.optimizer.momentum=1             → phase\.optimizer\.momentum must be .* got 1
model.schedule.coarse.momentum=2 phase=coarse       → phase\.optimizer\.momentum must be .* got 2
model.schedule.coarse.weight_decay=-1               → phase\.coarse\.optimizer\.weight_decay must be
phase=coarse phase.optimizer.weight_decay=2         → phase\.optimizer\.weight_decay must be 0 or more and less than 1
phase=coarse phase.optimizer.weight_decay=inf       → phase\.optimizer\.weight_decay must be
phase=coarse +phase.optimizer.dampening=2           → phase\.optimizer\.dampening must be between 0 and 1
phase=coarse +phase.optimizer.maximize=true         → phase\.optimizer\.maximize must be .*false.* got True
phase=coarse +phase.optimizer.nesterov=true phase.optimizer.momentum=0 → phase\.optimizer.*Nesterov
+phase.optimizer.eps=0                              → phase\.optimizer\.eps must be more than 0
+phase.optimizer.betas=[2,0.9]                      → phase\.optimizer.*beta
+phase.optimizer.lr=0.1                             → phase\.optimizer\.lr .*phase\.coarse_lr, phase\.sam_lr
phase=coarse +phase.optimizer.lr=0.1                → phase\.optimizer\.lr .*phase\.lr
phase=coarse phase.epochs=true                      → phase\.epochs=true
phase=coarse phase.lr=true                          → phase\.lr
seed=true                                           → seed=true
fold=true                                           → fold=true
+dataset.augment.rotate_deg=nan                     → dataset\.augment\.rotate_deg must be finite
+dataset.augment.rotate_deg=-10                     → dataset\.augment.*rotate_deg must be between 0 and 180
+dataset.augment.flip=2                             → dataset\.augment.*flip must be between 0 and 1
dataset.augment.rotate_deg=30 → no key dataset\.augment\.rotate_deg.*with \+dataset\.augment\.rotate_deg=
phase=sam +phase.failures.bins=[[0.9,0.95,-1]]      → bins
phase=sam +phase.failures.softness=nan              → phase\.failures
dataset.members=[busi]                              → dataset\.members.*dataset=combined
gate=learned gate.high=2                            → gate.*high=2
gate=learned gate.high=nan                          → gate\.high must be finite
gate=hybrid gate.low=-1                             → gate.*low=-1
gate=mean gate.low=0.6                              → gate.*low=0\.6
prompt_style.point=false                            → prompt_style.*negative
prompt_style.box_k=inf                              → prompt_style\.box_k must be
prompt_style=gaussian prompt_style.mask.sigma=2     → prompt_style.*sigma must lie in \(0, 1\], got 2
roi.k=inf                                           → roi\.k must be
roi.expand_ratio=inf                                → roi\.expand_ratio must be
roi.temperature=0                                   → roi\.temperature must be
model.train.image_encoder=-1                        → model\.train\.image_encoder=-1
model.train.image_encoder=1000                      → model\.train\.image_encoder=1000
model.lora.rank=100000                              → lora
'model.lora.rank=1' 'model.lora.targets=[nothing]'  → lora.*nothing
phase=sam model.train={image_encoder:false,prompt_encoder:false,mask_decoder:false} → nothing to train
dataset.folds=2.5                                   → dataset\.folds=2\.5
trainer.devices=1.5                                 → trainer\.devices=1\.5
hydra/sweeper=nothing                               → sweeper=nothing
output_root=''                                      → output_root must not be empty, got ''
output_root=' '                                     → output_root must not be empty
dataset=folder data_root=' '                        → data_root must not be empty
dataset.name=' '                                    → dataset\.name must not be empty
model.name=''                                       → model\.name must not be empty
phase.name=' '                                      → phase\.name must not be empty
prompt_style.name=''                                → prompt_style\.name must not be empty
protection.name=' '                                 → protection\.name must not be empty
gate.name=''                                        → gate\.name must not be empty
trainer.accelerator=''                              → trainer\.accelerator must not be empty
trainer.strategy=' '                                → trainer\.strategy must not be empty
phase.coarse_checkpoint=''                          → phase\.coarse_checkpoint must not be empty
phase.sam_checkpoint=' '                            → phase\.sam_checkpoint must not be empty
model.coarse_weights=''                             → model\.coarse_weights must not be empty
model.sam.checkpoint=''                             → model\.sam\.checkpoint must not be empty
model.sam.family=' '                                → model\.sam\.family must not be empty
model.coarse.name=''                                → model\.coarse\.name must not be empty
model.coarse._target_=''                            → model\.coarse\._target_ must not be empty
roi._target_=' '                                    → roi\._target_ must not be empty
phase._target_=''                                   → phase\._target_ must not be empty
phase.optimizer._target_=''                         → phase\.optimizer\._target_ must not be empty
phase=sam phase.masks=''                            → phase\.masks must not be empty
model.gradient=''                                   → model\.gradient must not be empty
dataset=combined "dataset.members=['']" data_root=/tmp → dataset\.members must not be empty
dataset=combined "dataset.members=[busi,' ']" data_root=/tmp → dataset\.members must not be empty
dataset=combined dataset.members=[busi,busi] data_root=/tmp → dataset\.members|busi
dataset=folder data_root=/tmp dataset.reader.table='' → dataset\.reader\.table must not be empty
model.lora.rank=1 "model.lora.targets=['']"         → model\.lora\.targets must not be empty
model.lora.rank=1 model.lora.blocks=[]              → lora blocks=\[\]
model.lora.rank=1 model.lora.alpha=nan              → model\.lora\.alpha must be more than 0
dataset.without=[]                                  → dataset\.without=\[\]
phase.epochs=99999999999999999999999                → phase\.epochs must be between 1 and 1000000
gate=learned gate.width=100000000                   → gate.*width must be between 1 and 1024
output_root=FILE                                    → mistake\.txt.*another output_root
output_root=FILE/below                              → mistake\.txt.*another output_root
dataset.limit.train=-5                              → dataset\.limit\.train must be 1 or more
trainer.save_minutes=1e400                          → trainer\.save_minutes must be 0 or more, got inf
trainer.devices=1e3                                 → trainer\.devices=1e3
dataset.folds=20                                    → 20 folds
dataset.include_normal=null                         → dataset\.include_normal=null
model.gradient=null                                 → model\.gradient=null
phase.grad_clip=nan                                 → phase\.grad_clip must be more than 0
phase.patience=1.5                                  → phase\.patience=1\.5
model.selection_temperature=nan                     → model\.selection_temperature must be more than 0
protection.coarse_loss_weight=inf                   → protection\.coarse_loss_weight must be 0 or more
phase.coarse_checkpoint=shipped                     → coarse\.safetensors was trained with other settings
phase.sam_checkpoint=shipped                        → sam\.safetensors was trained with .*roi=off \(here on\)
prompt_style.mask.foo=1                             → prompt_style\.mask\.foo
+prompt_style.mask.foo=1                            → prompt_style.*'foo'
+model.coarse.width=abc                             → model\.coarse.*'width'
+phase.optimizer.betas=[0.9,nan]                    → phase\.optimizer\.betas must be finite
trainer.accelerator=mps                             → trainer=.accelerator: mps
"""
ROWS = [tuple(part.strip() for part in line.split(" → ")) for line in TABLE.strip().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where all of them would write; the data are read once."""
    return tmp_path_factory.mktemp("mistakes")


@pytest.mark.parametrize(("overrides", "sentence"), ROWS, ids=[overrides for overrides, _ in ROWS])
def test_a_mistake_is_one_sentence_before_training(overrides, sentence, command, folder, monkeypatch):
    def accepted(*_):
        raise AssertionError(f"{overrides} would be trained")

    monkeypatch.setattr(experiment, "train", accepted)
    # Hydra puts a configuration together twice, the first time only to learn whether it is a sweep: minutes here.
    monkeypatch.setattr(Hydra, "get_mode", lambda *_, **__: None)
    (folder / "mistake.txt").write_text("no weights")
    given = [text.replace("=FILE", f"={folder / 'mistake.txt'}") for text in shlex.split(overrides)]
    micro = [text for text in MICRO if "reader" not in text or "dataset=" not in overrides]
    done = command(*(f"output_root={folder}/out", *micro, *given))
    lines = [line for line in done.err.splitlines() if line.strip()]
    assert done.status == 1 and len(lines) == 1 and re.search(f"^error: .*(?:{sentence})", lines[0]), done.err
    assert not list(folder.rglob("*.ckpt"))


def test_there_are_enough_of_them():
    assert len(ROWS) == len(set(ROWS)) >= 300
